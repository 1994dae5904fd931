"""LiGO"""
