-- upload.lua METHOD PREFIX SIZE AUTHORIZATION: a new file of SIZE bytes below PREFIX with each request, by PUT or,
-- with POST, as the form that KernelCI's uploader sends.

local BOUNDARY = "----------------------------bench"
local threads, sent = 0, 0
local method, prefix, content, headers

function setup(thread)
   thread:set("number", threads)
   threads = threads + 1
end

function init(args)
   method, prefix, content = args[1], args[2], string.rep("0123456789abcdef", tonumber(args[3]) / 16)
   headers = { Authorization = args[4] }
   if method == "POST" then
      headers["Content-Type"] = "multipart/form-data; boundary=" .. BOUNDARY
   end
end

local function part(attributes, body)
   return "--" .. BOUNDARY .. "\r\nContent-Disposition: form-data; " .. attributes .. "\r\n\r\n" .. body .. "\r\n"
end

function request()
   sent = sent + 1
   local name = number .. "-" .. sent .. ".bin"
   if method == "PUT" then
      return wrk.format("PUT", "/" .. prefix .. "/" .. name, headers, content)
   end
   local file = part('name="file0"; filename="' .. name .. '"\r\nContent-Type: application/octet-stream', content)
   local body = part('name="path"', prefix) .. file .. "--" .. BOUNDARY .. "--\r\n"
   return wrk.format("POST", "/upload", headers, body)
end
