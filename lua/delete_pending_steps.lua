-- delete_pending_steps: deletes the records of the given steps that are pending, and the run if no step remains.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
--       2 step, …
-- REPLY {"deleted", nonce, position, …}  of the given steps that have no record now, from 0, ascending
-- Writes only when at least one of the steps is pending.

-- include record
-- include run
-- include runs
-- include history
-- include bulk

local steps, done = KEYS[1], KEYS[2]
local FIRST = 2
@OPEN_RUN

local reply, names, fields = { "deleted", nonce }, {}, {}
for position = FIRST, #ARGV do
  names[#names + 1] = "s" .. ARGV[position]
end
for index, line in ipairs(read_fields(steps, names)) do
  local step = ARGV[FIRST + index - 1]
  local first_attempt, attempt, deleted = 1, 0, true
  if line and not string.find(line, @READ_NEVER_CLAIMED) then -- a step never claimed has no attempts to parse
    local state = parse_state(line)
    if not state then
      return unreadable(steps, names[index], line)
    end
    deleted = state.status == @PENDING
    first_attempt, attempt = math.max(1, state.attempt - HISTORY), state.attempt
  end
  if deleted then
    reply[#reply + 1] = index - 1
  end
  if deleted and line then
    local last = #fields
    fields[last + 1], fields[last + 2] = names[index], "i" .. step
    fields[last + 3], fields[last + 4], fields[last + 5] = "e" .. step, "w" .. step, "p" .. step
    fields[last + 6] = "f" .. step
    for number = first_attempt, attempt do
      fields[#fields + 1] = attempt_field(number, step)
    end
  end
end
write_chunks("HDEL", steps, fields)
if fields[1] then
  renew_expiry(run, steps, done, now_ms())
  local of_run = 1 + redis.call("HEXISTS", steps, "m") + redis.call("HEXISTS", steps, "c") + redis.call("HEXISTS", steps, "l")
  if redis.call("HLEN", steps) == of_run then -- no step is left
    drop_run(steps)
    redis.call("DEL", steps, done)
  end
end
return reply
