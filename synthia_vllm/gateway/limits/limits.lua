-- Limits of one user in Redis: each call is one atomic step. Semantics as in base.py.
-- KEYS[1]  prefix with the user in a hash tag, so that all keys are on one node of a Redis cluster
-- ARGV     operation, time in s ("" for Redis' own; tests set it), what it should be by the gateway's own clock ("" where
--          it can't know), lease in s, month, seconds left of it, then per operation:
--   reserve   call, tokens, requests_per_minute, tokens_per_minute, concurrent_requests, tokens_per_month ("" for none),
--             and where the answer without them was 'unseeded': what the ledger has of a month, and which
--   settle    call, tokens
--   renew     call, call, …
--   look      as reserve, and books nothing
--   standing
-- The answer begins with the time by which it was decided.
local prefix, operation, lease, month, month_left = KEYS[1], ARGV[1], tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6])
local window = prefix .. ':window'    -- zset: call -> time of admission, of the last 60 s
local tokens_of = prefix .. ':tokens' -- hash: call -> tokens, of the same; '' -> their sum
local open = prefix .. ':open'        -- zset: call -> end of its lease
local lapsed = prefix .. ':lapsed'    -- zset: call -> when its lease ended, of those that nobody has settled
local booked = prefix .. ':booked'    -- hash: call -> tokens|month|time of admission, of those two; '' -> mean duration
local clock = prefix .. ':clock'      -- hash: how far our time is from Redis', and the last that it was
local function month_key(name) return prefix .. ':month:' .. name end

-- Redis' clock can be set, and a window must not care: our time goes by what the gateways measure where the two are at
-- odds, and never backwards.
local jump = 5 -- s; more than a question may be under way
local function measured()
  local told = tonumber(ARGV[2])
  if not told then
    local time = redis.call('TIME')
    told = tonumber(time[1]) + tonumber(time[2]) / 1e6
  end
  local off, last = unpack(redis.call('HMGET', clock, 'off', 'last'))
  local now, expected = told + (tonumber(off) or 0), tonumber(ARGV[3])
  if expected and math.abs(now - expected) > jump then now = expected end
  if last and now < tonumber(last) then now = tonumber(last) end
  redis.call('HSET', clock, 'off', string.format('%.6f', now - told), 'last', string.format('%.6f', now))
  return now
end
local now = measured()
local stamp = string.format('%.6f', now)

local function booking(call)
  local tokens, of_month, at = string.match(redis.call('HGET', booked, call) or '', '([^|]*)|([^|]*)|(.*)')
  return tonumber(tokens), of_month, tonumber(at)
end
local function count(call, of_month, change)
  if redis.call('ZSCORE', window, call) then
    redis.call('HINCRBY', tokens_of, call, change)
    redis.call('HINCRBY', tokens_of, '', change)
  end
  if redis.call('EXISTS', month_key(of_month)) == 1 then redis.call('INCRBY', month_key(of_month), change) end
end

local function settle(call, used)
  local tokens, of_month, at = booking(call)
  if not tokens then return end
  if redis.call('ZREM', open, call) == 0 then tokens = 0 end -- given back when its lease ended
  redis.call('ZREM', lapsed, call)
  redis.call('HDEL', booked, call)
  count(call, of_month, used - tokens)
  local mean = tonumber(redis.call('HGET', booked, '') or '1')
  redis.call('HSET', booked, '', tostring(mean + 0.2 * (now - at - mean)))
end

-- Before leases are looked at: one that is over, but that nobody has released yet, is still its gateway's. One that was
-- released was of a gateway that stood still: its reservation is back.
if operation == 'settle' then
  settle(ARGV[7], tonumber(ARGV[8]))
elseif operation == 'renew' then
  for i = 7, #ARGV do
    local tokens, of_month = booking(ARGV[i])
    if tokens then
      if redis.call('ZREM', lapsed, ARGV[i]) == 1 then count(ARGV[i], of_month, tokens) end
      redis.call('ZADD', open, now + lease, ARGV[i])
    end
  end
end

for _, call in ipairs(redis.call('ZRANGEBYSCORE', window, '-inf', now - 60)) do
  -- `0 -`: a minus sign alone would make `-0` of 0, which Redis takes for no integer
  redis.call('HINCRBY', tokens_of, '', 0 - (tonumber(redis.call('HGET', tokens_of, call)) or 0))
  redis.call('HDEL', tokens_of, call)
  redis.call('ZREM', window, call)
end
-- Of gateways that are gone, or stand still. What they did not put into the ledger is not billed.
for _, call in ipairs(redis.call('ZRANGEBYSCORE', open, '-inf', now)) do
  local tokens, of_month = booking(call)
  redis.call('ZREM', open, call)
  if tokens then
    redis.call('ZADD', lapsed, now, call)
    count(call, of_month, -tokens)
  end
end
for _, call in ipairs(redis.call('ZRANGEBYSCORE', lapsed, '-inf', now - 3600)) do
  redis.call('ZREM', lapsed, call)
  redis.call('HDEL', booked, call)
end

local function keep()
  -- A day, by Redis' clock, whatever that is set to.
  for _, key in ipairs({window, tokens_of, open, lapsed, booked, clock}) do redis.call('EXPIRE', key, 86400) end
end

if operation == 'settle' or operation == 'renew' then
  keep()
  return {stamp}
end

local requests = redis.call('ZCARD', window)
local sum = tonumber(redis.call('HGET', tokens_of, '') or '0')
local running = redis.call('ZCARD', open)
if operation == 'standing' then
  keep()
  return {stamp, requests, sum, running, tonumber(redis.call('GET', month_key(month)) or '0')}
end

local call, tokens = ARGV[7], tonumber(ARGV[8])
local per_minute, tokens_per_minute, at_once, per_month =
  tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local spent = redis.call('GET', month_key(month))
if per_month and not spent then
  if ARGV[14] ~= month then return {stamp, 'unseeded'} end
  -- The ledger does not have what is open yet.
  spent = tonumber(ARGV[13])
  for _, other in ipairs(redis.call('ZRANGE', open, 0, -1)) do
    local reserved, of_month = booking(other)
    if of_month == month then spent = spent + reserved end
  end
  redis.call('SET', month_key(month), spent, 'EX', math.ceil(month_left) + 864000)
end

local reason, limit, wait = nil, nil, -1
local function refuse(why, bound, seconds)
  if seconds > wait then reason, limit, wait = why, bound, seconds end
end
if per_minute and requests >= per_minute then
  local last = redis.call('ZRANGE', window, requests - per_minute, requests - per_minute, 'WITHSCORES')
  refuse('requests_per_minute', per_minute, tonumber(last[2]) + 60 - now)
end
if tokens_per_minute and sum + tokens > tokens_per_minute then
  if tokens > tokens_per_minute then
    refuse('tokens_per_minute', tokens_per_minute, math.huge)
  else
    local excess = sum + tokens - tokens_per_minute
    local admissions = redis.call('ZRANGE', window, 0, -1, 'WITHSCORES')
    for i = 1, #admissions, 2 do
      excess = excess - (tonumber(redis.call('HGET', tokens_of, admissions[i])) or 0)
      if excess <= 0 then
        refuse('tokens_per_minute', tokens_per_minute, tonumber(admissions[i + 1]) + 60 - now)
        break
      end
    end
  end
end
if at_once and running >= at_once then
  local oldest = now
  for _, other in ipairs(redis.call('ZRANGE', open, 0, -1)) do
    local _, _, at = booking(other)
    if at and at < oldest then oldest = at end
  end
  local mean = tonumber(redis.call('HGET', booked, '') or '1')
  refuse('concurrent_requests', at_once, math.max(1, mean - (now - oldest)))
end
if per_month and tonumber(spent) + tokens > per_month then
  refuse('tokens_per_month', per_month, tokens > per_month and math.huge or month_left)
end
if operation == 'look' then keep() end
if reason then return {stamp, reason, limit, tostring(wait)} end
if operation == 'look' then return {stamp} end

redis.call('ZADD', window, now, call)
redis.call('HSET', tokens_of, call, tokens)
redis.call('HINCRBY', tokens_of, '', tokens)
redis.call('ZADD', open, now + lease, call)
-- tostring keeps 14 digits: microseconds are kept by format
redis.call('HSET', booked, call, tokens .. '|' .. month .. '|' .. stamp)
if spent then redis.call('INCRBY', month_key(month), tokens) end
keep()
return {stamp}
