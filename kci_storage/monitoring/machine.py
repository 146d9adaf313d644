# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metrics of the machine, read at each scrape: processor, memory, load, disks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


def mounts(folders: Iterable[Path]) -> Iterator[tuple[str, str, Path]]:
    """For each folder: its device, its mount point, and the folder or, if it does not exist yet, its nearest parent.

    The local driver makes its folder with the first upload.
    """
    mounted = {partition.mountpoint: partition.device for partition in psutil.disk_partitions(all=True)}
    for folder in folders:
        path = folder.resolve()
        path = next(parent for parent in (path, *path.parents) if parent.exists())
        mount = next((str(parent) for parent in (path, *path.parents) if str(parent) in mounted), "/")
        yield mounted.get(mount, "unknown"), mount, path


def machine_metrics() -> Iterator[Metric]:
    """The machine's processor, memory and load."""
    times = psutil.cpu_times()
    cpu = CounterMetricFamily("kci_storage_machine_cpu_seconds", "Processor time of all cores", labels=["mode"])
    for mode in ("user", "system", "idle", "iowait"):
        cpu.add_metric([mode], getattr(times, mode, 0.0))
    yield cpu
    memory = psutil.virtual_memory()
    yield gauge("kci_storage_machine_memory_total_bytes", "The machine's memory", {}, memory.total)
    yield gauge("kci_storage_machine_memory_available_bytes", "Memory to be had", {}, memory.available)
    load = GaugeMetricFamily("kci_storage_machine_load", "Load average", labels=["minutes"])
    for minutes, average in zip(("1", "5", "15"), os.getloadavg(), strict=True):
        load.add_metric([minutes], average)
    yield load


def gauge(name: str, help_text: str, labels: dict[str, str], value: float) -> Metric:
    """A gauge with one value.

    :param labels: the labels' names and values.
    """
    family = GaugeMetricFamily(name, help_text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
