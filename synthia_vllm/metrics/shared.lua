-- What gateways have counted, each under its own id: every call is one atomic step. See shared.py.
-- KEYS[1]  hash: id -> snapshot; `gone` -> the sum of all that have been folded
-- KEYS[2]  hash: id -> the number of its last publication, negative once it has left
-- KEYS[3]  prefix: of an id that has been folded -> that number; of a label -> set of the values that are told
-- ARGV     operation, then per operation:
--   group    an id: which group the engines belong to, whose KEYS these are; that one where they have none
--   admit    label, how many values there may be ('' for all of these), value, value, …: 1 or 0 for each
--   publish  id, number, snapshot ('' where it is the last one still), left, everything, anew (it may be missing)
--            -> {'ok', numbers, snapshots (with `everything`)}, {'folded', number} or {'missing'}
--   fold     id, its number, the sum that is there ('' for none), the sum with this one: 1, or 0 where either has changed
--   restore  id, snapshot, number, id, …: where all is lost, as after a restart of Redis
local keep = 86400 -- s; then nobody's counts go on
local operation = ARGV[1]

if operation == 'group' then
  local found
  for _, key in ipairs(KEYS) do found = found or redis.call('GET', key) end
  found = found or ARGV[2]
  for _, key in ipairs(KEYS) do
    if (redis.call('GET', key) or found) == found then redis.call('SET', key, found, 'EX', keep) end
  end
  return found
end

local told, numbers, prefix = KEYS[1], KEYS[2], KEYS[3]

if operation == 'admit' then
  local names, most, found = prefix .. ARGV[2], tonumber(ARGV[3]), {}
  local many = redis.call('SCARD', names)
  for place = 4, #ARGV do
    local known = redis.call('SISMEMBER', names, ARGV[place])
    if known == 0 and (not most or many < most) then
      known, many = redis.call('SADD', names, ARGV[place]), many + 1
    end
    found[#found + 1] = known
  end
  redis.call('EXPIRE', names, keep)
  return found
end

if operation == 'publish' then
  local id, number, snapshot, left, everything = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5] == '1', ARGV[6] == '1'
  local folded = redis.call('GET', prefix .. id)
  if folded then return {'folded', folded} end
  local last = redis.call('HGET', numbers, id)
  if not last and number > 1 and ARGV[7] ~= '1' then return {'missing'} end
  if not last or math.abs(tonumber(last)) < number then -- else it is an old question that was long under way
    if snapshot ~= '' then redis.call('HSET', told, id, snapshot) end
    redis.call('HSET', numbers, id, left and -number or number)
  end
  for _, key in ipairs({told, numbers, prefix .. 'user', prefix .. 'model'}) do redis.call('EXPIRE', key, keep) end
  return {'ok', redis.call('HGETALL', numbers), everything and redis.call('HGETALL', told) or {}}
end

if operation == 'fold' then
  if redis.call('HGET', numbers, ARGV[2]) ~= ARGV[3] then return 0 end
  if (redis.call('HGET', told, 'gone') or '') ~= ARGV[4] then return 0 end
  redis.call('HSET', told, 'gone', ARGV[5])
  redis.call('HDEL', told, ARGV[2])
  redis.call('HDEL', numbers, ARGV[2])
  redis.call('SET', prefix .. ARGV[2], string.format('%d', math.abs(tonumber(ARGV[3]))), 'EX', keep)
  return 1
end

if operation == 'restore' and redis.call('EXISTS', told) == 0 then
  for place = 2, #ARGV, 3 do
    redis.call('HSET', told, ARGV[place], ARGV[place + 1])
    if ARGV[place + 2] ~= '' then redis.call('HSET', numbers, ARGV[place], ARGV[place + 2]) end
  end
end
return 0
