-- run: formats a run line, and sets the expiry of the run's two keys. Needs record.

local function format_run(run)
  local line = @RUN(run.created, run.completed)
  if run.ttl then
    line = line .. @RUN_EXPIRY(run.ttl, run.unleased, run.retained_until)
  end
  return line
end

-- A new run expires `ttl` after its last write; "" for never.
local function set_ttl_if_new(run, ttl)
  if not run.exists and ttl ~= "" then
    run.ttl, run.unleased, run.retained_until = ttl, 0, 0
  end
end

-- A claim begins or is extended: the run must outlive it.
local function retain(run, lease, started)
  if not run.ttl then
    return
  end
  if lease == "" then
    run.unleased = run.unleased + 1
  else
    run.retained_until = math.max(run.retained_until, started + lease)
  end
end

-- A live claim ends or is about to be extended. A lease stays in run.retained_until.
local function unretain(run, lease)
  if run.ttl and lease == "" then
    run.unleased = math.max(0, run.unleased - 1)
  end
end

-- Both keys expire together, `ttl` after the last write, and never while a claim is live.
local function renew_expiry(run, steps, done, now)
  if not run.ttl then
    return
  end
  if tonumber(run.unleased) > 0 then
    redis.call("PERSIST", steps)
    redis.call("PERSIST", done)
  else
    local at = math.max(now, run.retained_until) + run.ttl
    redis.call("PEXPIREAT", steps, at)
    redis.call("PEXPIREAT", done, at)
  end
end
