-- The journal of replies in Redis: each call is one atomic step.
-- Of each reply, KEYS has a hash (owner, run, created, digest, live, closed, settled, prompt); beside it is a list of
-- records. What is written comes in one piece, and is answered in one: a gateway writes twenty times a second, of all its
-- replies, and each word of a command costs it a microsecond or two.
-- ARGV     operation, seconds that they are kept, then
--   append   in MessagePack, of each reply: owner, run, created, digest, whether it is new, records before, records
--            answers a letter for each: 'k' (kept), 't' (taken: another gateway goes on with it), 'o' (another reply has
--            its name), or 'm' (missing: Redis has lost what was there)
--   close    as append of one, then settled tokens and whether the prompt is settled
--   claim    owner, digest, whether one whose gateway is alive may be taken
--            answers 'none', 'other' (it is of another body), 'live', or 'ok' with what there is
--   forget   owner
local operation, keep = ARGV[1], tonumber(ARGV[2])
local LEASE = 2 -- s, that a gateway counts as alive after its last word; it tells every second
local function now() return tonumber(redis.call('TIME')[1]) end

local function append(hash, written)
  local owner, run, created, digest, new, before, records = unpack(written)
  local list = hash .. ':records'
  local there = redis.call('HMGET', hash, 'owner', 'run', 'closed')
  if new and there[1] ~= owner then
    redis.call('DEL', hash, list)
    there = {}
  end
  if there[1] and there[2] ~= run then return 'o' end
  if there[1] and there[1] ~= owner then return 't' end
  if there[3] then return 'k' end
  local length = redis.call('LLEN', list)
  if length < before then return 'm' end
  for i = 1 + length - before, #records do -- those before have come with a call whose answer was lost
    redis.call('RPUSH', list, records[i])
  end
  redis.call('HSET', hash, 'owner', owner, 'run', run, 'created', created, 'digest', digest, 'live', now() + LEASE)
  redis.call('EXPIRE', hash, keep)
  redis.call('EXPIRE', list, keep)
  return 'k'
end

if operation == 'append' then
  local answers = {}
  for i, written in ipairs(cmsgpack.unpack(ARGV[3])) do answers[i] = append(KEYS[i], written) end
  return table.concat(answers)
end

local hash, list = KEYS[1], KEYS[1] .. ':records'
if operation == 'close' then
  local answer = append(hash, cmsgpack.unpack(ARGV[3])[1])
  if answer == 'k' then redis.call('HSET', hash, 'closed', 1, 'settled', ARGV[4], 'prompt', ARGV[5]) end
  return answer
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
