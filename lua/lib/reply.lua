-- reply: replies with parts of a record. Needs record.

local function with_record(word, steps, step)
  local values = redis.call("HMGET", steps, "s" .. step, "i" .. step, "o" .. step, "e" .. step, "p" .. step)
  return { word, nonce, values[1], values[2], values[3], values[4], values[5] }
end

-- Without a token, the caller may not know the input. With a mark, there may be progress. Without a payload, one string
-- costs less than a table.
local function with_input(word, line, token, steps, step, mark)
  if token ~= "" and not mark then
    return word .. " " .. nonce .. " " .. line
  end
  local values = redis.call("HMGET", steps, "i" .. step, "p" .. step)
  return { word, nonce, line, values[1], mark and values[2] or nil }
end
