-- What a chat holds so far is not a user's any more. What nobody may see is removed.
-- KEYS: 1 chat (hash), 2 messages (stream)
-- ARGV: 1 user, 2 the other one of a one-to-one chat, or the same if there is none; '' in a group
local at = redis.call('HMGET', KEYS[1], 'seq', 'first')
if not at[1] then return 0 end
redis.call('HSET', KEYS[1], 's:' .. ARGV[1], at[1])
redis.call('HDEL', KEYS[1], 'd:' .. ARGV[1], 'r:' .. ARGV[1], 'p:' .. ARGV[1])
local nobodys = ARGV[2] ~= '' and tonumber(redis.call('HGET', KEYS[1], 's:' .. ARGV[2]) or '0') or 0
local first = tonumber(at[2]) or 1
if first <= nobodys then trim(KEYS[1], KEYS[2], first, tonumber(at[1]), nobodys + 1, 0) end
return 1
