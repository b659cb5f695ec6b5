-- Limits of one user in Redis: each call is one atomic step. Semantics as in base.py.
-- KEYS[1]  prefix with the user in a hash tag, so that all keys are on one node of a Redis cluster
-- ARGV     operation, time in s ("" for Redis' own; tests set it), lease in s, month, seconds left of it, then per operation:
--   reserve   call, tokens, requests_per_minute, tokens_per_minute, concurrent_requests, tokens_per_month ("" for none),
--             and where the answer without them was 'unseeded': what the ledger has of a month, and which
--   settle    call, tokens
--   renew     call, call, …
--   standing
local prefix, operation, lease, month, month_left = KEYS[1], ARGV[1], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local now = tonumber(ARGV[2])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end
local window = prefix .. ':window'    -- zset: call -> time of admission, of the last 60 s
local tokens_of = prefix .. ':tokens' -- hash: call -> tokens, of the same; '' -> their sum
local open = prefix .. ':open'        -- zset: call -> end of its lease
local booked = prefix .. ':booked'    -- hash: call -> tokens|month|time of admission, of the open ones; '' -> mean duration
local function month_key(name) return prefix .. ':month:' .. name end

local function settle(call, used, finished)
  local booking = redis.call('HGET', booked, call)
  if redis.call('ZREM', open, call) == 0 or not booking then return end
  local tokens, of_month, at = string.match(booking, '([^|]*)|([^|]*)|(.*)')
  redis.call('HDEL', booked, call)
  local change = used - tonumber(tokens)
  if redis.call('ZSCORE', window, call) then
    redis.call('HINCRBY', tokens_of, call, change)
    redis.call('HINCRBY', tokens_of, '', change)
  end
  if redis.call('EXISTS', month_key(of_month)) == 1 then redis.call('INCRBY', month_key(of_month), change) end
  if finished then
    local mean = tonumber(redis.call('HGET', booked, '') or '1')
    redis.call('HSET', booked, '', tostring(mean + 0.2 * (now - tonumber(at) - mean)))
  end
end

-- Before leases are looked at: one that is over, but that nobody has released yet, is still its gateway's.
if operation == 'settle' then
  settle(ARGV[6], tonumber(ARGV[7]), true)
elseif operation == 'renew' then
  for i = 6, #ARGV do redis.call('ZADD', open, 'XX', now + lease, ARGV[i]) end
end

for _, call in ipairs(redis.call('ZRANGEBYSCORE', window, '-inf', now - 60)) do
  -- `0 -`: a minus sign alone would make `-0` of 0, which Redis takes for no integer
  redis.call('HINCRBY', tokens_of, '', 0 - (tonumber(redis.call('HGET', tokens_of, call)) or 0))
  redis.call('HDEL', tokens_of, call)
  redis.call('ZREM', window, call)
end
-- Of gateways that are gone. What they did not put into the ledger is not billed.
for _, call in ipairs(redis.call('ZRANGEBYSCORE', open, '-inf', now)) do settle(call, 0, false) end

local function keep()
  for _, key in ipairs({window, tokens_of, open, booked}) do redis.call('EXPIRE', key, 3600) end
end

if operation == 'settle' or operation == 'renew' then
  keep()
  return {}
end

local requests = redis.call('ZCARD', window)
local sum = tonumber(redis.call('HGET', tokens_of, '') or '0')
local running = redis.call('ZCARD', open)
if operation == 'standing' then
  return {requests, sum, running, tonumber(redis.call('GET', month_key(month)) or '0')}
end

local call, tokens = ARGV[6], tonumber(ARGV[7])
local per_minute, tokens_per_minute, at_once, per_month =
  tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local spent = redis.call('GET', month_key(month))
if per_month and not spent then
  if ARGV[13] ~= month then return {'unseeded'} end
  -- The ledger does not have what is open yet.
  spent = tonumber(ARGV[12])
  for _, booking in ipairs(redis.call('HVALS', booked)) do
    local reserved, of_month = string.match(booking, '([^|]*)|([^|]*)|')
    if of_month == month then spent = spent + tonumber(reserved) end
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
  for _, value in ipairs(redis.call('HVALS', booked)) do
    local at = string.match(value, '|([^|]*)$')
    if at and tonumber(at) < oldest then oldest = tonumber(at) end
  end
  local mean = tonumber(redis.call('HGET', booked, '') or '1')
  refuse('concurrent_requests', at_once, math.max(1, mean - (now - oldest)))
end
if per_month and tonumber(spent) + tokens > per_month then
  refuse('tokens_per_month', per_month, tokens > per_month and math.huge or month_left)
end
if reason then return {reason, limit, tostring(wait)} end

redis.call('ZADD', window, now, call)
redis.call('HSET', tokens_of, call, tokens)
redis.call('HINCRBY', tokens_of, '', tokens)
redis.call('ZADD', open, now + lease, call)
-- tostring keeps 14 digits: microseconds are kept by format
redis.call('HSET', booked, call, tokens .. '|' .. month .. '|' .. string.format('%.6f', now))
if spent then redis.call('INCRBY', month_key(month), tokens) end
keep()
return {}
