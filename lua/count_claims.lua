-- count_claims: counts a bucket's leased claims, separately live and lapsed; or its failed steps, which all count as lapsed.
--
-- KEYS  1 claims, or failed
-- ARGV  1 nonce   of this call, echoed
-- REPLY {"counts", nonce, live, lapsed}
-- Writes nothing.

-- include record

local claims = KEYS[1]

local all = redis.pcall("ZCARD", claims)
if type(all) == "table" then
  return failed_call(claims, all)
end
local lapsed = all > 0 and redis.call("ZCOUNT", claims, "-inf", now_ms()) or 0
return { "counts", nonce, all - lapsed, lapsed }
