"""Durable writing of files, their properties, locks between processes: the only place that writes."""
