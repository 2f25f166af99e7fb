-- begin_step: claims steps of a run, each for one delivery, or returns why they must be skipped.
--
-- KEYS  1 steps, 2 done, 3 claims, 4 failed
-- ARGV  1 token   of this claim only; a re-sent call is recognized by it
--       2 step
--       3 input   of the caller; ignored if the step was scheduled with an input
--       4 run     "<bytes in the run id>:<run id>", for the indexes
--       5 lease_ms      or ""  the claim never expires; trailing arguments may be omitted from here on
--       6 owner         or ""
--       7 new_run       what a run that this call creates gets: "" or ttl_ms, then a space and labels if it gets any
--       8 max_attempts  or ""  no limit
--       9 lease_expired_error  last error of a step whose last attempt lost its lease; required with max_attempts
--       10 fingerprint  of the input, or ""
--       11 all          or ""  a different fingerprint of one step refuses them all
--       12 token, step, input, …  of further steps, each step once; fingerprint, too, if the first one has one
-- REPLY "execute nonce state" | {"execute", nonce, state, input}  if the stored input is not the caller's
--       {"execute", nonce, state, input, progress}  if an earlier attempt has left progress; a nil input is the caller's
--       {"takeover", nonce, state, input, progress}  the same for a claim whose lease had expired
--       {"completed" | "failed" | "exhausted" | "superseded", nonce, state, input, output, error, progress}
--       {"busy", nonce, state, input, output, error, progress, remaining_ms | ""}
--       {"delayed", nonce, state, input, output, error, progress, remaining_ms}
--       {"mismatch", nonce, step, fingerprint}  the step has this different fingerprint
--       {"cancelled", nonce, state, input, output, error, progress, reason}  the run; without a record, state is pending at
--       position 0, is not stored, and there is no payload
--       {"each", nonce, reply, …}  of several steps: a reply for each, as above, or state, which stands for "execute nonce state"
-- Writes only when it first replies "execute" or "takeover", or turns an expired claim into a failure ("exhausted").

local KEYS, ARGV, string, call, try = KEYS, ARGV, string, redis.call, redis.pcall -- locals cost less
local steps, done, claims = KEYS[1], KEYS[2], KEYS[3]
local token, step, lease, owner = ARGV[1], ARGV[2], ARGV[5], ARGV[6] or ""
local MORE = 12

-- The common case: one new step without a fingerprint, in a run that does not expire, or in a new run without labels. The
-- general path below does the same at a higher cost. A quarter of the new runs that expire are left to it: see expired_entries.
local field = "s" .. step
local lines = not ARGV[10] and try("HMGET", steps, "r", field)
if lines and not lines.err and not lines[2] then
  local created, completed
  local ttl = "" -- of a new run
  if not lines[1] then
    ttl = ARGV[7] or ""
    local is_common = ttl == "" or string.byte(token, -1) % 4 ~= 0 and not string.find(ttl, " ", 1, true)
    if is_common and call("EXISTS", steps, done) == 0 then
      created, completed = 0, 0
    end
  else
    created, completed = string.match(lines[1], @READ_RUN .. "$")
    if created and (#created > @MAX_DIGITS or try("ZCARD", done) ~= completed + 0) then
      created = nil
    end
  end
  if created then
    local time = call("TIME")
    local now = @NOW(time)
    if lease == "" or try("ZADD", claims, now + lease, ARGV[4] .. step) == 1 then
      if lines[1] or tonumber(try("ZADD", string.sub(claims, 1, -7) .. "runs", now, ARGV[4])) then
        created = string.format("%d", created + 1)
        local run, line = @RUN(created, completed), @FIRST_CLAIM(token, lease, now, created, owner)
        if ttl ~= "" and lease == "" then -- the run does not expire until the claim ends
          run = run .. @RUN_EXPIRY(ttl, "1", "0", "0")
        elseif ttl ~= "" then
          local ends = string.format("%d", now + lease)
          run = run .. @RUN_EXPIRY(ttl, "0", "1", ends)
        end
        call("HSET", steps, "r", run, field, line, "i" .. step, ARGV[3])
        if ttl ~= "" and lease ~= "" then
          call("PEXPIREAT", steps, now + lease + ttl)
        end
        return "execute " .. token .. " " .. line
      end
      if lease ~= "" then -- without an entry, this would be the first write, after which a full server accepts all others
        try("ZREM", claims, ARGV[4] .. step) -- the index of runs has another type
      end
    end
  end
end

-- general path
-- include record
-- include run
-- include new_run
-- include group

local failed = KEYS[4]
local fingerprint = ARGV[10] or ""
local positions, fields = steps_of_call(2, MORE + 1, fingerprint == "" and 3 or 4)
local run, lines, refusal = load_run(steps, done, unpack(fields))
@RETURN_REFUSAL
local now = now_ms()
set_up(run, ARGV[7] or "")

local function fingerprint_of(index)
  return (fingerprint == "" or index == 1) and fingerprint or ARGV[positions[index] + 2]
end

-- include claim

local replies, states, known = { "each", nonce }, {}, nil
for index = 1, #positions do
  local position, line = positions[index], lines[index + 1]
  if line then
    known = parse_state(line)
    if not known then
      return unreadable(steps, fields[index], line)
    end
    states[index] = known
  else
    replies[index + 2] = claim(ARGV[position - 1], ARGV[position], fields[index], ARGV[position + 1], fingerprint_of(index))
  end
end
if known then
  -- include begin
  if fingerprint ~= "" then
    for index = 1, #positions do
      local position, state = positions[index], states[index]
      local other = state and input_mismatch(state, ARGV[position - 1], ARGV[position], fingerprint_of(index))
      if other and (ARGV[11] or "") ~= "" then
        return other
      elseif other then
        states[index], replies[index + 2] = nil, other
      end
    end
  end
  if positions[2] then
    @CHECK_INDEXES(claims, failed) -- before the first write about any of the steps
  end
  for index, state in pairs(states) do
    local position = positions[index]
    replies[index + 2] = begin(state, ARGV[position - 1], ARGV[position], ARGV[position + 1], fingerprint_of(index))
  end
end
return write_claims() or reply_of_steps(replies, "execute")
