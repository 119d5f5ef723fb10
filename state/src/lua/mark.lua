-- How far a life of a state server has pushed, and how far the others have.
-- KEYS: 1 marks (hash: server and life -> how far it has pushed, and when it said so)   ARGV: 1 field, 2 time (0: now)
-- Returns {now, stamp, all fields and values}. The stamp, a field of its own, rises with every mark: a store that lacks the
-- one last seen is an older copy.
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000000 + time[2])
redis.call('HSET', KEYS[1], ARGV[1], (ARGV[2] == '0' and now or ARGV[2]) .. ' ' .. now)
local stamp = redis.call('HINCRBY', KEYS[1], '#', 1)
return {now, stamp, redis.call('HGETALL', KEYS[1])}
