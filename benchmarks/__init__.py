# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make bench``: the server beside nginx, Varnish and bare gunicorn, under the same load.

A group of workloads is a module (:mod:`~benchmarks.hits`, :mod:`~benchmarks.uploads`, :mod:`~benchmarks.archives`,
:mod:`~benchmarks.cold`).
:mod:`~benchmarks.stage` starts what they need, :mod:`~benchmarks.load` is the clients, :mod:`~benchmarks.measuring`
runs them in turns, and :mod:`~benchmarks.report` and :mod:`~benchmarks.chart` show what came out.
"""
