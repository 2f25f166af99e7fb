-- reply: replies with parts of a record. Needs record.

local function with_record(word, steps, step)
  local values = redis.call("HMGET", steps, "s" .. step, "i" .. step, "o" .. step, "e" .. step)
  return { word, nonce, values[1], values[2], values[3], values[4] }
end

-- Without a token, the caller may not know the input. Without a payload, one string costs less than a table.
local function with_input(word, line, token, steps, step)
  if token ~= "" then
    return word .. " " .. nonce .. " " .. line
  end
  return { word, nonce, line, redis.call("HGET", steps, "i" .. step) }
end
