-- delete_pending_steps: forgets the pending ones among the given steps.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
--       2 step, …
-- REPLY {"gone", nonce, position, …}  of those among the given steps that have no record now, from 0, ascending
-- Writes only when at least one of the steps is pending.

-- include record
-- include run
-- include history

local steps, done = KEYS[1], KEYS[2]
local FIRST = 2
local CHUNK = 1000 -- arguments of one redis.call; Lua's stack takes about 8,000

local run, _, refusal = load(steps, done)
if refusal then
  return refusal
end
local reply, fields = { "gone", nonce }, {}
for first = FIRST, #ARGV, CHUNK do
  local names = {}
  for position = first, math.min(first + CHUNK - 1, #ARGV) do
    names[position - first + 1] = "s" .. ARGV[position]
  end
  for index, line in ipairs(redis.call("HMGET", steps, unpack(names))) do
    local position = first + index - 1
    local step = ARGV[position]
    local gone = true
    if line and string.find(line, "^1p 0 %d* %S* %d* %d* %d* %d+ %d+ %S* ") then -- never begun: it has no history
      local last = #fields
      fields[last + 1], fields[last + 2] = names[index], "i" .. step
      fields[last + 3], fields[last + 4] = "e" .. step, "w" .. step
    elseif line then
      local state = parse_state(line)
      if not state then
        return unreadable(steps, names[index], line)
      end
      gone = state.status == PENDING
      if gone then
        fields[#fields + 1] = "s" .. step
        fields[#fields + 1] = "i" .. step
        fields[#fields + 1] = "e" .. step
        fields[#fields + 1] = "w" .. step
        for number = math.max(1, state.attempt - HISTORY), state.attempt do
          fields[#fields + 1] = "a" .. number .. ":" .. step
        end
      end
    end
    if gone then
      reply[#reply + 1] = position - FIRST
    end
  end
end
for first = 1, #fields, CHUNK do
  redis.call("HDEL", steps, unpack(fields, first, math.min(first + CHUNK - 1, #fields)))
end
if fields[1] then
  renew_expiry(run, steps, done, now_ms())
end
return reply
