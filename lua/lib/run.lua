-- run: formats a run line, and sets the expiry of the run's two keys. Needs record.

local function format_run(run)
  local line = @RUN(run.created, run.completed)
  if run.ttl then
    line = line .. @RUN_EXPIRY(run.ttl, run.unleased, run.leased, run.retained_until)
  end
  if run.cancelled then
    line = line .. @RUN_CANCELLED
  end
  return line
end

-- A run expires `ttl` after its last write, and retains nothing yet.
local function set_ttl(run, ttl)
  run.ttl, run.unleased, run.leased, run.retained_until = ttl, 0, 0, 0
end

-- A claim begins or is extended, or a failure delays the next one: the run must outlive the lease or the delay.
local function retain(run, lease, started)
  if not run.ttl then
    return
  end
  if lease == "" then
    run.unleased = run.unleased + 1
  else
    run.leased = run.leased + 1
    run.retained_until = math.max(run.retained_until, started + lease)
  end
end

-- A claim or a delay ends, or is about to be extended. The longest lease counts until the last one has ended, because
-- the longest of the others is not known.
local function unretain(run, lease)
  if not run.ttl then
    return
  end
  if lease == "" then
    run.unleased = math.max(0, run.unleased - 1)
  else
    run.leased = math.max(0, run.leased - 1)
    if run.leased == 0 then
      run.retained_until = 0
    end
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
