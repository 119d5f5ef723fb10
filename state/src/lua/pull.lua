-- Messages behind (or before) a cursor.
-- KEYS: 1 chat (hash), 2 messages (stream), 3 history   ARGV: 1 cursor, 2 count, 3 '1': backwards
-- Returns {history or '', seq or '', entries}.
local entries
if ARGV[3] == '1' then
  local from = ARGV[1] == '0' and '+' or '(' .. ARGV[1] .. '-0'
  entries = redis.call('XREVRANGE', KEYS[2], from, '-', 'COUNT', ARGV[2])
else
  entries = redis.call('XRANGE', KEYS[2], '(' .. ARGV[1] .. '-0', '+', 'COUNT', ARGV[2])
end
return {redis.call('GET', KEYS[3]) or '', redis.call('HGET', KEYS[1], 'seq') or '', entries}
