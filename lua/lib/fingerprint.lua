-- fingerprint: refuses a delivery with a different input. Needs record.

-- The refusal if the step has a different fingerprint; nil if it has none, or if the caller has none ("").
local function other_fingerprint(steps, step, fingerprint)
  local stored = fingerprint ~= "" and redis.call("HGET", steps, "f" .. step)
  if stored and stored ~= fingerprint then
    return { "mismatch", nonce, step, stored }
  end
end
