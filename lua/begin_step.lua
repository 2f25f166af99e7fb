-- begin_step: claims a step for one delivery, or returns why it must be skipped.
--
-- KEYS  1 steps, 2 done, 3 claims, 4 failed
-- ARGV  1 token   of this call only; it becomes the claim's token, by which a re-sent call is recognized
--       2 step
--       3 run     "<bytes in the run id>:<run id>", for the indexes
--       4 input   of the caller; ignored if the step was scheduled with an input
--       5 lease_ms      or ""  the claim never expires; trailing arguments may be omitted from here on
--       6 owner         or ""
--       7 ttl_ms        or ""  of the run, if this call creates it
--       8 max_attempts  or ""  no limit
--       9 lease_expired_error  last error of a step whose last attempt lost its lease; required with max_attempts
-- REPLY "execute nonce state" | {"execute", nonce, state, input}  if the stored input is not the caller's
--       {"takeover", nonce, state, input}  the same for a claim whose lease had expired
--       {"completed" | "exhausted" | "superseded", nonce, state, input, output, error}
--       {"busy", nonce, state, input, output, error, remaining_ms | ""}
-- Writes only when it first replies "execute", or "takeover", or turns an expired claim into a failure ("exhausted").

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local token, step, input, lease, owner = ARGV[1], ARGV[2], ARGV[4], ARGV[5], ARGV[6] or ""

-- The common case: a new step in a run that does not expire. The general path below does the same at a higher cost.
local lines = redis.pcall("HMGET", steps, "r", "s" .. step)
if not lines.err and lines[1] and not lines[2] then
  local created, completed = string.match(lines[1], @READ_RUN .. "$")
  if created and redis.pcall("ZCARD", done) == tonumber(completed) then
    local time = redis.call("TIME")
    local now = @NOW(time)
    if lease == "" or type(redis.pcall("ZADD", claims, now + lease, ARGV[3] .. step)) == "number" then
      created = created + 1 .. ""
      local line = @FIRST_CLAIM(token, lease, now, created, owner)
      redis.call("HSET", steps, "r", @RUN(created, completed), "s" .. step, line, "i" .. step, input)
      return "execute " .. token .. " " .. line
    end
  end
end

-- include record
-- include run

@OPEN_STEP
local now = now_ms()

-- include begin
