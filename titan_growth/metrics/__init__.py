"""What a run reports: records, sinks, throughput meter, recorder and profiler."""

from titan_growth.metrics.boards import TensorBoardSink, WandbSink
from titan_growth.metrics.hardware import memory_gib, peak_flops_per_second
from titan_growth.metrics.profiling import Profiler
from titan_growth.metrics.recorder import Recorder
from titan_growth.metrics.records import MEASURED, GrowthRecord, Record, StepRecord, ValidationRecord
from titan_growth.metrics.sinks import ConsoleSink, JsonlSink, Sink
from titan_growth.metrics.throughput import Throughput, Window

__all__ = [
    "MEASURED",
    "ConsoleSink",
    "GrowthRecord",
    "JsonlSink",
    "Profiler",
    "Record",
    "Recorder",
    "Sink",
    "StepRecord",
    "TensorBoardSink",
    "Throughput",
    "ValidationRecord",
    "WandbSink",
    "Window",
    "memory_gib",
    "peak_flops_per_second",
]
