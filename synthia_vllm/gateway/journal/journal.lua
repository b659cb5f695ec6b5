-- The journal of replies in Redis: each call is one atomic step.
-- Of each reply, KEYS has a hash (owner, run, created, digest, live, closed, settled, prompt) and a list of records.
-- ARGV     operation, seconds that they are kept, then
--   append   for each reply: owner, run, created, digest, 'new' | 'known', records before, their number, records…
--            answers 'ok', 'taken' (another gateway goes on with it), 'other' (another reply has its name), or
--            'missing' (Redis has lost what was there) for each
--   close    as append for one, then settled tokens and whether the prompt is settled
--   claim    owner, digest, whether one whose gateway is alive may be taken
--            answers 'none', 'other' (it is of another body), 'live', or 'ok' with what there is
--   forget   owner
local operation, keep = ARGV[1], tonumber(ARGV[2])
local LEASE = 2 -- s, that a gateway counts as alive after its last word; it tells every second
local function now() return tonumber(redis.call('TIME')[1]) end

local function append(hash, list, at)
  local owner, run, created, digest, state, before, count =
    ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6])
  local first = at + 7
  local after = first + count
  local there = redis.call('HMGET', hash, 'owner', 'run', 'closed')
  if state == 'new' and there[1] ~= owner then
    redis.call('DEL', hash, list)
    there = {}
  end
  if there[1] and there[2] ~= run then return 'other', after end
  if there[1] and there[1] ~= owner then return 'taken', after end
  if there[3] then return 'ok', after end
  local length = redis.call('LLEN', list)
  if length < before then return 'missing', after end
  for i = first + length - before, after - 1 do -- those before have come with a call whose answer was lost
    redis.call('RPUSH', list, ARGV[i])
  end
  redis.call('HSET', hash, 'owner', owner, 'run', run, 'created', created, 'digest', digest, 'live', now() + LEASE)
  redis.call('EXPIRE', hash, keep)
  redis.call('EXPIRE', list, keep)
  return 'ok', after
end

if operation == 'append' then
  local answers, at = {}, 3
  for i = 1, #KEYS, 2 do
    answers[#answers + 1], at = append(KEYS[i], KEYS[i + 1], at)
  end
  return answers
end

local hash, list = KEYS[1], KEYS[2]
if operation == 'close' then
  local answer, at = append(hash, list, 3)
  if answer == 'ok' then redis.call('HSET', hash, 'closed', 1, 'settled', ARGV[at], 'prompt', ARGV[at + 1]) end
  return {answer}
end
if operation == 'forget' then
  if redis.call('HGET', hash, 'owner') == ARGV[3] then redis.call('DEL', hash, list) end
  return {}
end

local found = redis.call('HMGET', hash, 'owner', 'run', 'created', 'digest', 'live', 'closed', 'settled', 'prompt')
if not found[1] then return {'none'} end
if found[4] ~= ARGV[4] then return {'other'} end
if ARGV[5] ~= '1' and not found[6] and now() < tonumber(found[5]) then return {'live'} end
redis.call('HSET', hash, 'owner', ARGV[3], 'live', now() + LEASE)
redis.call('HDEL', hash, 'closed')
redis.call('EXPIRE', hash, keep)
redis.call('EXPIRE', list, keep)
local answer = {'ok', found[1], found[2], found[3], found[6] or '0', found[7] or '0', found[8] or '0'}
for _, record in ipairs(redis.call('LRANGE', list, 0, -1)) do answer[#answer + 1] = record end
return answer
