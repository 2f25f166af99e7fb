-- advance_step: completes a step and claims the next step of its run: complete_step and begin_step in one call.
--
-- KEYS  1 steps, 2 done, 3 claims, 4 failed
-- ARGV  1 token   of the next claim; 1 to 9 are the arguments of begin_step for the next step
--       2 step, 3 input, 4 run, 5 lease_ms, 6 owner, 7 ttl_ms, 8 max_attempts, 9 lease_expired_error
--       10 from        the step to complete
--       11 from_token  of the claim on it, or ""  any claim
--       12 output      of the step to complete
--       13 fingerprint  of the input, or omitted
-- REPLY as begin_step, about the next step, once the first is completed:
--       "execute nonce state" | {"execute" | "takeover", nonce, state, input, progress}
--       {"completed" | "failed" | "exhausted" | "superseded", nonce, state, input, output, error, progress}
--       {"busy", nonce, state, input, output, error, progress, remaining_ms | ""}
--       {"delayed", nonce, state, input, output, error, progress, remaining_ms}
--       {"mismatch", nonce, step, fingerprint}  the next step has this different fingerprint
--       {"cancelled", nonce, state, input, output, error, progress, reason}  the run
--       {"stale", nonce, state, input, output, error, progress} | {"missing", nonce}  about the step to complete
-- Writes only when it first completes the step, and what begin_step writes. It does both or neither.

local KEYS, ARGV, string, call, try = KEYS, ARGV, string, redis.call, redis.pcall -- locals cost less
local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local token, step, input, lease, owner = ARGV[1], ARGV[2], ARGV[3], ARGV[5], ARGV[6] or ""
local from, from_token, output = ARGV[10], ARGV[11], ARGV[12]

-- The common case: a live claim without a mark, and then a new step without a fingerprint, in a run that does not expire.
-- The general path below does the same at a higher cost.
local lines = try("HMGET", steps, "r", "s" .. from, "w" .. from, "s" .. step)
if lines[1] and lines[2] and not lines[3] and not lines[4] and not ARGV[13] then
  local created, completed = string.match(lines[1], @READ_RUN .. "$")
  local claim, holder, from_lease, started, created_at, rest = string.match(lines[2], @READ_RUNNING)
  if
    created
    and #created <= @MAX_DIGITS
    and holder == from_token
    and @ARE_SHORT(claim, holder, from_lease, started, created_at, rest)
    and try("ZCARD", done) == completed + 0
  then
    local time = call("TIME")
    local now = @NOW(time)
    if
      (from_lease == "" or try("ZREM", claims, ARGV[4] .. from) == 1)
      and (lease == "" or try("ZADD", claims, now + lease, ARGV[4] .. step) == 1)
    then
      created, completed = string.format("%d", created + 1), string.format("%d", completed + 1)
      call("ZADD", done, completed, from)
      local span = now - created_at - started
      local ended = @DURATION(span)
      local last = @STATE(@COMPLETED, claim, "", started, ended, created_at, rest)
      local line = @FIRST_CLAIM(token, lease, now, created, owner)
      local run = @RUN(created, completed)
      call("HSET", steps, "r", run, "s" .. from, last, "o" .. from, output, "s" .. step, line, "i" .. step, input)
      return "execute " .. token .. " " .. line
    end
  end
end

-- general path
-- include record
-- include run

local run, previous, refusal = load_step(steps, done, from)
if refusal then
  return refusal
end
if not previous then
  return { "missing", nonce }
end
local line = redis.call("HGET", steps, "s" .. step)
local state = line and parse_state(line)
if line and not state then
  return unreadable(steps, "s" .. step, line)
end
local now = now_ms()

-- include reply
-- include indexes
-- include complete
-- include marks

local completed = complete(from, "s" .. from, previous.line, from_token, output)
if not completed then
  local resent = previous.status == @COMPLETED and (from_token == previous.token or from_token == "")
  if not resent or redis.call("HGET", steps, "o" .. from) ~= output then
    return with_record("stale", steps, from)
  end
end

-- Returns the refusal if an index has another type.
local function complete_first()
  if not completed then -- an earlier copy of this call has
    return nil
  end
  -- Only an index that will change is checked.
  if state or lease ~= "" or previous.lease ~= "" then
    @CHECK_INDEXES(claims, state and failed or nil)
  end
  if previous.lease ~= "" then
    redis.call("ZREM", claims, ARGV[4] .. from)
  end
  write_completed()
  settle_mark(steps, from, previous.mark, true)
end

local fingerprint = ARGV[13] or ""
if state then
  -- include begin
  return input_mismatch(state, token, step, fingerprint)
    or complete_first()
    or begin(state, token, step, input, fingerprint)
end
refusal = complete_first()
@RETURN_REFUSAL
-- include new_run
-- include claim
local line = claim(token, step, "s" .. step, input, fingerprint)
if run.cancelled then
  return line
end
return write_claims() or "execute " .. token .. " " .. line
