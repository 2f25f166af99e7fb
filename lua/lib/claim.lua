-- claim: claims steps that have no record. Needs record and new_run.
--
-- Reads run and now, both loaded, and the arguments of begin_step.

local entries, written, ends = {}, {}, lease ~= "" and now + lease
local member = ARGV[4]

-- Returns the state line, which `write_claims` writes. In a cancelled run, returns the reply: of a step that is not stored.
local function claim(token, step, field, input, fingerprint)
  if run.cancelled then
    local reason = redis.call("HGET", steps, "c") or ""
    return { "cancelled", nonce, @PENDING_LINE("", now, "0"), false, false, false, false, reason }
  end
  local created = run.created + 1
  run.created = created
  retain(run, lease, now)
  local line, count = @FIRST_CLAIM(token, lease, now, created, owner), #written
  written[count + 1] = field
  written[count + 2] = line
  written[count + 3] = "i" .. step
  written[count + 4] = input
  if fingerprint ~= "" then
    written[count + 5] = "f" .. step
    written[count + 6] = fingerprint
  end
  if ends then
    local last = #entries
    entries[last + 1] = ends
    entries[last + 2] = member .. step
  end
  return line
end

-- Returns the refusal if an index has another type: each of the first writes checks its own key.
local function write_claims()
  if entries[1] then
    local reply = redis.pcall("ZADD", claims, unpack(entries))
    if type(reply) == "table" then
      return failed_call(claims, reply)
    end
  end
  if written[1] then
    local refused = enter_if_new(run, steps, now)
    if refused then
      for index = 2, #entries, 2 do
        redis.call("ZREM", claims, entries[index])
      end
      return refused
    end
    redis.call("HSET", steps, "r", format_run(run), unpack(written))
    renew_expiry(run, steps, done, now)
  end
end
