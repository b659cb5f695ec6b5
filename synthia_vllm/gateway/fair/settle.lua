-- One gateway's settlement with the others before the same engines: one atomic step, without a clock.
-- KEYS[1]  hash: gateway -> beat, group, engines, what it holds, the most it may hold, whether requests wait there
-- KEYS[2]  hash: gateway -> what it tells of its queue, of the gateways of one group: those before the very same engines
-- KEYS[3]  hash: user -> service from all gateways of the group
-- ARGV[1]  the gateway
-- ARGV[2]  by msgpack: its entry; need: tokens and requests of its next request; room: those of the engines, negative for
--          unknown; dead: beats of gateways that are, as this one sees it; users: name, service, more service, …
-- ARGV[3]  what it tells of its queue; empty where it leaves for good
-- The answer: by msgpack {whether it was here, the most it may hold, what is free (negative: over), service of the users}, and per gateway
-- its name, its entry and what it tells ('' where it is of another group).
local gateways, told, service = KEYS[1], KEYS[2], KEYS[3]
local id, mine, tells = ARGV[1], cmsgpack.unpack(ARGV[2]), ARGV[3]
local forgotten, most_users = 86400, 50000

local function entry(name)
  local packed = redis.call('HGET', gateways, name)
  return packed and cmsgpack.unpack(packed)
end
local before = entry(id)

-- A question whose answer was lost is asked again: it is counted once, and one that comes late says nothing any more.
if before and before.beat > mine.beat then return {} end
local names, totals = {}, {}
for at = 1, #mine.users, 3 do names[#names + 1] = mine.users[at] end
if names[1] then
  for at, had in ipairs(redis.call('HMGET', service, unpack(names))) do totals[at] = tonumber(had or 0) end
end
if names[1] and (not before or before.beat < mine.beat) then
  local changed = {}
  for at, had in ipairs(totals) do
    totals[at] = math.max(had, mine.users[3 * at - 1]) + mine.users[3 * at]
    if totals[at] ~= had then
      changed[#changed + 1] = names[at]
      changed[#changed + 1] = string.format('%.17g', totals[at])
    end
  end
  -- Users away for long have no credit to lose; totals of the others come back with the next settlements.
  if redis.call('HLEN', service) > most_users then redis.call('DEL', service) end
  if changed[1] then redis.call('HSET', service, unpack(changed)) end
  redis.call('EXPIRE', service, forgotten)
end

for name, beat in pairs(mine.dead) do
  local found = entry(name)
  if found and found.beat == beat then -- else it only stood still
    redis.call('HDEL', gateways, name)
    redis.call('HDEL', told, name)
  end
end
if tells == '' then
  redis.call('HDEL', gateways, id)
  redis.call('HDEL', told, id)
  return {cmsgpack.pack({true, mine.held, mine.held, totals})}
end

local answer = {''}
local number, waiting, held, most = 1, mine.waits and 1 or 0, {0, 0}, {0, 0}
local all = redis.call('HGETALL', gateways)
for at = 1, #all, 2 do
  local name, packed = all[at], all[at + 1]
  if name ~= id then
    local other = cmsgpack.unpack(packed)
    local same = other.group == mine.group
    if same then
      number = number + 1
      if other.waits then waiting = waiting + 1 end
      for kind = 1, 2 do
        held[kind] = held[kind] + other.held[kind]
        most[kind] = most[kind] + other.most[kind]
      end
    end
    answer[#answer + 1] = name
    answer[#answer + 1] = packed
    answer[#answer + 1] = same and redis.call('HGET', told, name) or ''
  end
end

-- Its even part of what is free, among those with requests waiting, and of what no other one may take. Where nobody
-- waits all have a part, so that what comes next need not wait either; one with nothing under way a small one, since it
-- settles less often, and at once when something waits. Where too much is held, all hold less.
local idle = mine.held[2] == 0 and not mine.waits
local lease, free, enough = {}, {}, true
for kind = 1, 2 do
  local part, room, own = 0, mine.room[kind], mine.held[kind]
  local left = room - own - held[kind]
  if number == 1 then part = left
  elseif waiting == 0 then part = math.floor((idle and math.min(left, room / 16) or left) / number)
  elseif mine.waits then part = math.max(math.floor(left / waiting), mine.need[kind]) end
  part = math.max(0, math.min(part, room - own - most[kind]))
  if room < 0 then
    lease[kind], free[kind] = -1, 1e12
  else
    free[kind], lease[kind] = left, left < 0 and math.floor(own * room / (room - left)) or own + part
    enough = enough and part >= mine.need[kind]
  end
end
if mine.waits and not enough then -- together with what others leave it is enough for one of them
  for kind = 1, 2 do lease[kind] = math.min(lease[kind], mine.held[kind]) end
end

mine.most = {math.max(lease[1], mine.held[1]), math.max(lease[2], mine.held[2])}
redis.call('HSET', gateways, id, cmsgpack.pack({beat = mine.beat, group = mine.group,
  engines = mine.engines, held = mine.held, most = mine.most, waits = mine.waits}))
redis.call('HSET', told, id, tells)
redis.call('EXPIRE', gateways, forgotten)
redis.call('EXPIRE', told, forgotten)
answer[1] = cmsgpack.pack({before and true or false, lease, free, totals})
return answer
