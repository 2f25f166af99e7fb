-- new_run: what the call that creates a run sets: its expiry, its labels, and its entry in the index. Needs run.

-- include runs

-- Entries of expired runs are removed by sampling. A quarter of the calls that let a run expire choose eight entries at
-- random, and drop those whose runs are gone. So over time, at most about half of the entries belong to such runs. EXISTS
-- gets a key of this run, too: while a slot migrates, the server then refuses it if one of the runs may be on the other server.
--
-- Returns the entries to drop, apart from `own`. The caller drops them only after another write: as the first one, which a full
-- server accepts, it would make the server accept all later ones, too.
local function expired_entries(run, steps, bucket, own)
  local expired = {}
  if string.byte(nonce, -1) % 4 ~= 0 then -- not the time: calls may come at regular intervals
    return expired
  end
  local existing = run.exists and 1 or 0
  local members, keys = redis.pcall("ZRANDMEMBER", bucket .. "runs", -8), {}
  for position = 1, #members do
    keys[position] = bucket .. string.match(members[position], "^%d*:?([^\n]*)") .. ":steps"
  end
  if redis.pcall("EXISTS", steps, unpack(keys)) == existing + #keys then
    return expired -- as for most calls; the run id in a member is parsed exactly below
  end
  for position = 1, #members do
    local member = members[position]
    local run_id = parse_run_member(member) or ""
    if member ~= own and redis.pcall("EXISTS", steps, bucket .. run_id .. ":steps") == existing then
      expired[#expired + 1] = member
    end
  end
  return expired
end

local function drop_entries(bucket, entries)
  if entries[1] then
    redis.call("ZREM", bucket .. "runs", unpack(entries))
  end
end

-- What the run gets if this call creates it: `settings` is "" or the ttl_ms, and after a space the labels if there are any.
local function set_up(run, settings)
  if not run.exists and settings ~= "" then
    local ttl
    ttl, run.labels = string.match(settings, "^(%d*) ?(.*)$")
    if ttl ~= "" then
      set_ttl(run, ttl)
    end
  end
end

-- The first write of a call that may create a run. Returns the refusal if the index has another type.
local function enter_if_new(run, steps, now)
  if run.exists then
    return nil
  end
  local bucket, run_id = @PLACE(steps)
  local index, labels = bucket .. "runs", run.labels or ""
  local member = @RUN_MEMBER(run_id, labels)
  local expired = run.ttl and expired_entries(run, steps, bucket, member) or {}
  local reply = redis.pcall("ZADD", index, now, member)
  if type(reply) == "table" then
    return failed_call(index, reply)
  end
  drop_entries(bucket, expired)
  if labels ~= "" then
    redis.call("HSET", steps, "l", labels)
  end
end
