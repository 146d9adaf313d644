-- Put before each script: what wrk counted, as one line of JSON. Statuses count as errors from 400 on.

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '\nSUMMARY {"requests": %d, "seconds": %.6f, "bytes": %.0f, "connect": %d, "read": %d, "write": %d, ' ..
         '"status": %d, "timeout": %d, "p99": %.6f}\n',
      summary.requests, summary.duration / 1e6, summary.bytes, errors.connect, errors.read, errors.write,
      errors.status, errors.timeout, latency:percentile(99) / 1e6))
end
