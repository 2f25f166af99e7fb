-- extend_claim: restarts the leases of live claims from now.
--
-- KEYS  1 steps, 2 done, 3 claims
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 token   of the claim, or ""  any claim
--       4 lease_ms  or ""  the claim never expires, or 0  it can be taken over immediately
--       5 run     "<bytes in the run id>:<run id>", for the indexes
--       6 step, token, …  of further steps, each step once
-- REPLY "extended nonce state" | {"extended", nonce, state, input}  without a token
--       {"cancelled", nonce, state, input, nil, reason}  extended, in a cancelled run
--       {"stale", nonce, state, input, output, error, progress} | {"missing", nonce}
--       {"each", nonce, reply, …}  of several steps: a reply for each, as above, or state, which stands for "extended nonce state"
-- Writes only when it replies "extended" or "cancelled".

-- include record
-- include run
-- include reply
-- include group
-- include extend

local steps, done, claims = KEYS[1], KEYS[2], KEYS[3]
local lease, member = ARGV[4], ARGV[5]
local MORE = 6
local positions, fields = steps_of_call(2, MORE, 2)
local run, lines, refusal = load_run(steps, done, unpack(fields))
@RETURN_REFUSAL

local now = now_ms()
local ends = lease_end(lease, now)
local replies, written, entries, count = { "each", nonce }, {}, {}, 0
for index = 1, #positions do
  local step, token, line = ARGV[positions[index]], ARGV[positions[index] + 1], lines[index + 1]
  local claim, holder, held, started, created, rest = string.match(line or "", @READ_RUNNING)
  local is_held = claim and (token == holder or token == "")
  if is_held and (@ARE_SHORT(claim, holder, held, started, created, rest) or parse_state(line)) then
    local extended, entry = extend(run, held, created, started, ends)
    line = @STATE(@RUNNING, claim, extended, started, "", created, rest)
    entries[#entries + 1] = entry
    entries[#entries + 1] = member .. step
    written[count + 1], written[count + 2] = fields[index], line
    count = count + 2
    if run.cancelled then
      replies[index + 2] = cancelled_claim(steps, step, line)
    else
      replies[index + 2] = token ~= "" and line or with_input("extended", line, token, steps, step)
    end
  elseif not line then
    replies[index + 2] = { "missing", nonce }
  elseif not parse_state(line) then
    return unreadable(steps, fields[index], line)
  else
    replies[index + 2] = with_record("stale", steps, step)
  end
end
if written[1] then
  -- The first write checks its own key: if it fails, nothing is written.
  local reply = redis.pcall(lease == "" and "ZREM" or "ZADD", claims, unpack(entries))
  if type(reply) == "table" then
    return failed_call(claims, reply)
  end
  redis.call("HSET", steps, "r", format_run(run), unpack(written))
  renew_expiry(run, steps, done, now)
end
return reply_of_steps(replies, "extended")
