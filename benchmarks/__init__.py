# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make bench``: the server beside nginx, Varnish and bare gunicorn, under the same load.

Each group of workloads is a module: :mod:`~benchmarks.hits`, :mod:`~benchmarks.uploads`, :mod:`~benchmarks.archives`,
:mod:`~benchmarks.cold`, :mod:`~benchmarks.slow`. :mod:`~benchmarks.stage` starts the servers, :mod:`~benchmarks.load`
has the clients, :mod:`~benchmarks.measuring` runs the workloads in turns, and :mod:`~benchmarks.report` and
:mod:`~benchmarks.chart` print and draw the figures.
"""
