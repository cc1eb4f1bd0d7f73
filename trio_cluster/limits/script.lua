-- Counting on the side of the server: the rules of account.py and window.py, for all masters together.
--
-- A script runs alone, so what it reads cannot change before it writes. The time is that of the server, so the clocks of
-- the masters do not matter.
--
-- ARGV[1] is a JSON list of operations, in order; KEYS has four keys for each of them:
--   log      sorted set: the entries of the sliding window, with the time of each in microseconds
--   entries  hash: 't:ID' tokens and 'r:ID' requests of an entry (1 if missing); 'T' and 'R', the sums over all entries;
--            'o:ID' what an open reservation holds: its entry, its tokens, and the period of its budget
--   slots    sorted set: the open reservations, with the time at which the lease of each ends
--   budget   hash: 'period' and its 'tokens'
-- ARGV[2] is empty; tests put the time there.

local EXACT = 1024
local BUDGET_SECONDS = 40 * 86400
local SLOT_WAIT = 1000000

local now
if ARGV[2] ~= '' then
    now = tonumber(ARGV[2])
else
    local time = redis.call('TIME')
    now = tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- All digits of a number: the default is fourteen. Without the sign of a zero that was negated.
local function digits(number)
    return string.format('%.0f', number + 0)
end

local function number(key, field)
    return tonumber(redis.call('HGET', key, field) or 0) or 0
end

local function requests_of(entries, id)
    return tonumber(redis.call('HGET', entries, 'r:' .. id) or 1)
end

local function advance(log, entries, window)
    local left = digits(now - window)
    local gone = redis.call('ZRANGEBYSCORE', log, '-inf', left)
    if #gone > 0 then
        local requests, tokens = 0, 0
        for _, id in ipairs(gone) do
            requests = requests + requests_of(entries, id)
            tokens = tokens + number(entries, 't:' .. id)
            redis.call('HDEL', entries, 't:' .. id, 'r:' .. id)
        end
        redis.call('ZREMRANGEBYSCORE', log, '-inf', left)
        redis.call('HINCRBY', entries, 'R', digits(-requests))
        redis.call('HINCRBY', entries, 'T', digits(-tokens))
    end
    if redis.call('ZCARD', log) == 0 then
        -- Also if the server has evicted the log.
        redis.call('HDEL', entries, 'R', 'T')
    end
end

local function add(log, entries, window, id, requests, tokens)
    if redis.call('ZCARD', log) >= EXACT then
        id = 'm' .. digits(math.floor(now / math.floor(window / EXACT)))
        if redis.call('ZSCORE', log, id) then
            requests, tokens = requests + requests_of(entries, id), tokens + number(entries, 't:' .. id)
            redis.call('HINCRBY', entries, 'R', digits(-requests_of(entries, id)))
            redis.call('HINCRBY', entries, 'T', digits(-number(entries, 't:' .. id)))
        end
    end
    redis.call('ZADD', log, digits(now), id)
    redis.call('HSET', entries, 't:' .. id, digits(tokens))
    if requests ~= 1 then
        redis.call('HSET', entries, 'r:' .. id, digits(requests))
    end
    redis.call('HINCRBY', entries, 'R', digits(requests))
    redis.call('HINCRBY', entries, 'T', digits(tokens))
    return id
end

-- After how long there is room: when enough of the oldest entries have left.
local function wait_for(log, entries, window, of, limit, count, total)
    if total + count <= limit then
        return 0
    end
    local ids = redis.call('ZRANGE', log, 0, -1, 'WITHSCORES')
    for i = 1, #ids, 2 do
        total = total - (of == 'r' and requests_of(entries, ids[i]) or number(entries, 't:' .. ids[i]))
        if total + count <= limit then
            return tonumber(ids[i + 1]) + window - now
        end
    end
    return window
end

local function reset_of(log, entries, window, of)
    local from = 0
    while true do
        local ids = redis.call('ZREVRANGE', log, from, from + 9, 'WITHSCORES')
        if #ids == 0 then
            return 0
        end
        for i = 1, #ids, 2 do
            local amount = of == 'r' and requests_of(entries, ids[i]) or number(entries, 't:' .. ids[i])
            if amount > 0 then
                return tonumber(ids[i + 1]) + window - now
            end
        end
        from = from + 10
    end
end

-- The name of the calendar period, in UTC. The first day of all, 1970-01-01, was a Thursday.
local function period_of(per)
    local day = math.floor(now / 86400000000)
    if per == 'day' then
        return 'day-' .. digits(day)
    elseif per == 'week' then
        return 'week-' .. digits(math.floor((day + 3) / 7))
    end
    local shifted = day + 719468
    local era = math.floor(shifted / 146097)
    local of_era = shifted - era * 146097
    local year = math.floor(
        (of_era - math.floor(of_era / 1460) + math.floor(of_era / 36524) - math.floor(of_era / 146096)) / 365
    )
    local of_year = of_era - (365 * year + math.floor(year / 4) - math.floor(year / 100))
    local month = math.floor((5 * of_year + 2) / 153) -- from March on
    if month >= 10 then
        year = year + 1
    end
    return 'month-' .. digits(era * 400 + year) .. '-' .. digits((month + 2) % 12 + 1)
end

-- What is left, behind the other members of a reply.
local function with_state(reply, log, entries, window)
    reply[#reply + 1] = number(entries, 'R')
    reply[#reply + 1] = reset_of(log, entries, window, 'r')
    reply[#reply + 1] = number(entries, 'T')
    reply[#reply + 1] = reset_of(log, entries, window, 't')
    return reply
end

local function free_slots(entries, slots)
    -- Those of masters that have died: the living ones renew theirs.
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', slots, '-inf', digits(now))) do
        redis.call('HDEL', entries, 'o:' .. id)
        redis.call('ZREM', slots, id)
    end
end

local function keep(op, log, entries, slots)
    local milliseconds = digits(math.floor((2 * op.window + 4 * op.lease) / 1000) + 60000)
    redis.call('PEXPIRE', log, milliseconds)
    redis.call('PEXPIRE', entries, milliseconds)
    redis.call('PEXPIRE', slots, milliseconds)
end

local operations = {}

function operations.reserve(op, log, entries, slots, budget)
    local window, most = op.window, op.tokens
    advance(log, entries, window)
    free_slots(entries, slots)
    local function refuse(kind, wait, limit, needed)
        return with_state({ 0, kind, wait, limit, needed }, log, entries, window)
    end
    local period = ''
    if op.budget >= 0 then
        period = period_of(op.per)
        if redis.call('HGET', budget, 'period') ~= period then
            redis.call('DEL', budget)
            redis.call('HSET', budget, 'period', period, 'tokens', '0')
            redis.call('EXPIRE', budget, BUDGET_SECONDS)
        end
        local left = op.budget - number(budget, 'tokens')
        if op.least > left or left <= 0 then
            return refuse('budget', 0, op.budget, op.least)
        end
        most = math.min(most, left)
    end
    if op.tpm >= 0 then
        if op.least > op.tpm then
            return refuse('size', 0, op.tpm, op.least)
        end
        most = math.min(most, op.tpm)
    end
    local kind, wait, limit, needed = 'requests', 0, 0, 0
    if op.rpm >= 0 then
        wait = op.rpm == 0 and window or wait_for(log, entries, window, 'r', op.rpm, 1, number(entries, 'R'))
        limit, needed = op.rpm, 1
    end
    if op.tpm >= 0 then
        local tokens_wait = wait_for(log, entries, window, 't', op.tpm, most, number(entries, 'T'))
        if tokens_wait > wait then
            kind, wait, limit, needed = 'tokens', tokens_wait, op.tpm, most
        end
    end
    if op.concurrency >= 0 and redis.call('ZCARD', slots) >= op.concurrency then
        kind, wait, limit, needed = 'concurrency', math.max(wait, SLOT_WAIT), op.concurrency, 1
    end
    if wait > 0 then
        return refuse(kind, wait, limit, needed)
    end
    local entry = add(log, entries, window, op.id, 1, most)
    redis.call('HSET', entries, 'o:' .. op.id, entry .. ' ' .. digits(most) .. ' ' .. period)
    redis.call('ZADD', slots, digits(now + op.lease), op.id)
    if op.budget >= 0 then
        redis.call('HINCRBY', budget, 'tokens', digits(most))
    end
    keep(op, log, entries, slots)
    return with_state({ 1, '', 0, 0, most }, log, entries, window)
end

function operations.settle(op, log, entries, slots, budget)
    local open = redis.call('HGET', entries, 'o:' .. op.id)
    if not open then
        -- It was never made, was settled already, or its lease has ended.
        return { 0 }
    end
    redis.call('HDEL', entries, 'o:' .. op.id)
    redis.call('ZREM', slots, op.id)
    advance(log, entries, op.window)
    local entry, reserved, period = string.match(open, '^(%S+) (%d+) (%S*)$')
    local more = op.used < 0 and 0 or op.used - tonumber(reserved)
    if redis.call('ZSCORE', log, entry) then
        if more < 0 then
            redis.call('HINCRBY', entries, 't:' .. entry, digits(more))
            redis.call('HINCRBY', entries, 'T', digits(more))
        end
        if not op.counts then
            redis.call('HSET', entries, 'r:' .. entry, digits(requests_of(entries, entry) - 1))
            redis.call('HINCRBY', entries, 'R', '-1')
        end
    end
    if more > 0 then
        add(log, entries, op.window, 'x' .. op.id, 0, more)
    end
    if period ~= '' and redis.call('HGET', budget, 'period') == period then
        redis.call('HINCRBY', budget, 'tokens', digits(more))
    end
    keep(op, log, entries, slots)
    return { 1 }
end

function operations.renew(op, log, entries, slots)
    for _, id in ipairs(op.ids) do
        if redis.call('HEXISTS', entries, 'o:' .. id) == 1 then
            redis.call('ZADD', slots, digits(now + op.lease), id)
        end
    end
    keep(op, log, entries, slots)
    return { 1 }
end

function operations.state(op, log, entries)
    advance(log, entries, op.window)
    return with_state({ 1 }, log, entries, op.window)
end

local replies = {}
for i, op in ipairs(cjson.decode(ARGV[1])) do
    local at = 4 * i - 3
    replies[i] = operations[op.op](op, KEYS[at], KEYS[at + 1], KEYS[at + 2], KEYS[at + 3])
end
return replies
