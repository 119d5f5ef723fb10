-- Where a chat stands. KEYS: 1 chat (hash), 2 history   ARGV: 1 user
-- Returns {history or '', seq or '', delivered or '', first kept or ''}.
local at = redis.call('HMGET', KEYS[1], 'seq', 'd:' .. ARGV[1], 'first')
return {redis.call('GET', KEYS[2]) or '', at[1] or '', at[2] or '', at[3] or ''}
