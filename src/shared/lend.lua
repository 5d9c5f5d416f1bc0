-- One budget an account, many replicas: pays out what is on loan, one permit at a time (src/shared.rs has the rules).
--
-- KEYS[1]  the one hash: nothing of it can be evicted without the rest
-- ARGV     who, generation, time named in µs ('' says hello), lends (1 or 0), limit, replicas, window in µs;
--          then for each account that wants a permit: its name, weight, flights with a connection,
--          more than one waits (1 or 0), and what it knows of upstream's last 429: pause left in µs (0: nothing), rate
--          after it, pause chosen in µs
-- returns  generation, time, leases alive;
--          then for each account: µs to the permit's slot ('' is none), µs after which to ask again,
--          its part of what is paid out in millionths ('' where nothing is asked for), pause left in µs (below 0: over
--          for so long), rate, chosen

-- In µs, but for RECOVERY (s) and EXPIRES (ms). Rust has some of them, too: LEASE and STEP are LENT and STEP in
-- shared/lease.rs, LATEST is HEARTBEAT in shared/process.rs, RECOVERY is RECOVERY_S in budget/backoff.rs.
local LEASE, STEP, AHEAD = 1000000, 5000, 100000
-- Who asked counts as wanting for so long at least. Whose turn it is not asks again after so long, whoever finds
-- nothing on loan after so long, and nobody later than LATEST.
local WANTS, TURN, NOTHING_ON_LOAN, LATEST = 150000, 25000, 50000, 250000
-- From a standstill to the full rate, after upstream's 429.
local RECOVERY = 30
-- How often some accounts are looked at. Of those one is forgotten that has asked for nothing for so long, and whose
-- pause was over so long ago that its rate has recovered. The whole hash is, after so long without a call.
local SWEEP, FORGET, FORGET_PAUSE, EXPIRES = 100000, 10000000, 40000000, 60000

local function whole(number) return string.format('%.0f', number) end

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
local key, who = KEYS[1], ARGV[1]
local limit, replicas, window = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])

local known = redis.call('HMGET', key, 'run', 'generation', 'last', 'leases', 'swept', 'cursor')
local generation, last, leases, swept, cursor = known[2], tonumber(known[3]), {}, tonumber(known[5]), known[6]
if known[1] ~= run or not generation or not last or last > now + STEP then
  redis.call('UNLINK', key)
  generation, last, swept, cursor = run .. ':' .. whole(now), now, now, '0'
  redis.call('HSET', key, 'run', run, 'generation', generation, 'swept', whole(swept), 'cursor', cursor)
elseif known[4] then
  leases = cmsgpack.unpack(known[4])
end
redis.call('HSET', key, 'last', whole(math.max(last, now)))
redis.call('PEXPIRE', key, EXPIRES)

local function alive(at)
  local count = 0
  for _, ends in pairs(leases) do
    if ends > at then count = count + 1 end
  end
  return count
end

if ARGV[3] == '' or ARGV[2] ~= generation then
  return {generation, whole(now), alive(now)}
end

local ends = tonumber(ARGV[3]) + LEASE
if ARGV[4] == '1' and ends > (leases[who] or 0) then leases[who] = ends end
for other, over in pairs(leases) do
  if over < now - LEASE then leases[other] = nil end
end
redis.call('HSET', key, 'leases', cmsgpack.pack(leases))

-- What nobody has used for long is forgotten, a few accounts at a time.
if now - swept > SWEEP then
  local found = redis.call('HSCAN', key, cursor, 'MATCH', 'account:*', 'COUNT', 50)
  for i = 1, #found[2], 2 do
    local account = cmsgpack.unpack(found[2][i + 1])
    if account.asked < now - FORGET and account.paused < now - FORGET_PAUSE then
      redis.call('HDEL', key, found[2][i])
    end
  end
  redis.call('HSET', key, 'swept', whole(now), 'cursor', found[1])
end

local reply = {generation, whole(now), alive(now)}
if ends <= now then return reply end

for i = 8, #ARGV, 7 do
  local name, weight, flights = 'account:' .. ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local kept = redis.call('HGET', key, name)
  -- wants: by process, the virtual time of its next permit, its weight, until when it wants, and until when somebody
  -- waits there, who may have no connection yet: the same, or later (none in what another version of this kept, nor
  -- `virtual`)
  local account = kept and cmsgpack.unpack(kept) or {next = 0, asked = 0, wants = {}, paused = 0, rate = 0, chosen = 0}

  local left = tonumber(ARGV[i + 4])
  if left > 0 and now + left > account.paused then
    account.paused, account.rate, account.chosen = now + left, tonumber(ARGV[i + 5]), tonumber(ARGV[i + 6])
  end

  local slot = math.max(now, account.next)
  local missing = math.max(0, replicas - alive(slot))
  local pay = limit - math.floor(limit / replicas) * missing
  local granted, again, part = '', '', ''
  if flights > 0 then
    -- Start-time fair queueing among the processes: whoever was served least for its weight is next. Virtual time is
    -- where the last permit began, or where those who want have come since. Whoever comes, or comes back, starts there:
    -- what others had while it did not want is nobody's debt. One that does not want any more keeps its place until the
    -- others have come as far, or leaving for a moment would pay; but it waits off no more than one turn of the weight
    -- that it now has.
    local floor
    local weights = weight
    for other, want in pairs(account.wants) do
      if other ~= who and (want[4] or want[3]) > now then weights = weights + want[2] end
      if other ~= who and want[3] > now then
        if not floor or want[1] < floor then floor = want[1] end
      end
    end
    part = whole(1000000 * weight / weights)
    local mine = account.wants[who] or {0, 0, 0}
    local virtual = math.max(account.virtual or 0, floor or 0)
    if mine[3] <= now then mine[1] = math.max(mine[1], virtual) end
    mine[1] = math.min(mine[1], virtual + 1 / weight)
    mine[2], mine[3], mine[4] = weight, now + WANTS, now + WANTS
    account.wants[who] = mine
    -- This one may be further behind than all the others are: then not all have come as far as `floor`.
    local all = math.max(account.virtual or 0, math.min(floor or 0, mine[1]))
    for other, want in pairs(account.wants) do
      if (want[4] or want[3]) <= now and want[1] <= all then account.wants[other] = nil end
    end

    if account.paused > now then
      again = math.min(LATEST, account.paused - now)
    elseif slot - now > AHEAD then
      again = math.min(LATEST, slot - now - AHEAD / 2)
    elseif floor and mine[1] > floor then
      again = TURN
    elseif pay <= 0 then
      again = NOTHING_ON_LOAN
    else
      local rate = limit
      if account.paused > 0 then rate = account.rate + (slot - account.paused) / 1000000 * limit / RECOVERY end
      account.next = slot + window / math.min(pay, rate)
      account.virtual = math.max(account.virtual or 0, mine[1])
      mine[1] = mine[1] + 1 / weight
      mine[3], mine[4] = now, now
      if ARGV[i + 3] == '1' then
        -- A queue goes on to want, though it may have no flight with a connection at this moment: it has one soon.
        -- Until the next slot: if it has none by then, others have asked for that (what is late by a turn is not lost).
        mine[3] = slot + (flights > 1 and WANTS or math.min(WANTS, account.next - slot))
        mine[4] = slot + WANTS
      end
      granted = whole(slot - now)
    end
    if again ~= '' then
      -- It wants until it has asked again: else whoever is first to would find nobody to be compared with.
      mine[3] = math.max(mine[3], now + again + AHEAD / 2)
      mine[4] = mine[3]
    end
  end
  account.asked = now
  redis.call('HSET', key, name, cmsgpack.pack(account))

  reply[#reply + 1] = granted
  reply[#reply + 1] = again == '' and '' or whole(again)
  reply[#reply + 1] = part
  reply[#reply + 1] = account.paused > 0 and whole(account.paused - now) or ''
  reply[#reply + 1] = string.format('%.6f', account.rate)
  reply[#reply + 1] = whole(account.chosen)
end
return reply
