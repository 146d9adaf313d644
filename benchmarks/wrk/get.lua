-- get.lua FILE: requests that are lines of a file: a path, or a path, a header and its value, separated by tabs.

local prepared = {}

function init(args)
   for line in io.lines(args[1]) do
      local path, name, value = line:match("^([^\t]*)\t([^\t]*)\t(.*)$")
      prepared[#prepared + 1] = wrk.format("GET", path or line, name and { [name] = value } or {})
   end
   math.randomseed(os.time())
end

function request()
   return prepared[math.random(#prepared)]
end
