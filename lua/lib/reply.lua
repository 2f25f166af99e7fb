-- reply: the reply that carries a whole record. Needs record.

local function with_record(word, steps, step)
  local values = redis.call("HMGET", steps, "s" .. step, "i" .. step, "o" .. step, "e" .. step)
  return { word, nonce, values[1], values[2], values[3], values[4] }
end
