-- new_run: what the call that creates a run sets: its expiry, its labels, and its entry in the index. Needs run.

-- include runs

-- Entries of expired runs are removed by sampling. A quarter of the calls that let a run expire choose eight entries at
-- random, and drop those whose runs are gone. So over time, at most about half of the entries belong to such runs. EXISTS
-- gets a key of this run, too: while a slot migrates, the server then refuses it if one of the runs may be on the other server.
local function drop_expired(run, steps, bucket)
  if string.byte(nonce, -1) % 4 ~= 0 then -- not the time: calls may come at regular intervals
    return
  end
  local index, existing = bucket .. "runs", run.exists and 1 or 0
  local members, keys = redis.pcall("ZRANDMEMBER", index, -8), {}
  for position = 1, #members do
    keys[position] = bucket .. string.match(members[position], "^%d*:?([^\n]*)") .. ":steps"
  end
  if redis.pcall("EXISTS", steps, unpack(keys)) == existing + #keys then
    return -- as for most calls; the run id in a member is parsed exactly below
  end
  for position = 1, #members do
    local run_id = parse_run_member(members[position]) or ""
    if redis.pcall("EXISTS", steps, bucket .. run_id .. ":steps") == existing then
      redis.call("ZREM", index, members[position])
    end
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
  if run.ttl then
    drop_expired(run, steps, bucket)
  end
  local reply = redis.pcall("ZADD", index, now, @RUN_MEMBER(run_id, labels))
  if type(reply) == "table" then
    return failed_call(index, reply)
  end
  if labels ~= "" then
    redis.call("HSET", steps, "l", labels)
  end
end
