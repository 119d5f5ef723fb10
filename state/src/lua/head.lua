-- Where a chat stands. KEYS: 1 chat (hash), 2 history   ARGV: 1 user, 2 the other user of a one-to-one chat, if there is one
-- Returns {history or '', seq or '', delivered or '', first kept or '', read or '', up to where it was another's or '', the other's
-- delivered or '' and read or ''}.
local user, peer = ARGV[1], ARGV[2]
local at
if peer then
  at = redis.call('HMGET', KEYS[1], 'seq', 'd:' .. user, 'first', 'r:' .. user, 's:' .. user, 'd:' .. peer, 'r:' .. peer)
else
  at = redis.call('HMGET', KEYS[1], 'seq', 'd:' .. user, 'first', 'r:' .. user, 's:' .. user)
end
local found = {redis.call('GET', KEYS[2]) or ''}
for i = 1, 7 do found[i + 1] = at[i] or '' end
return found
