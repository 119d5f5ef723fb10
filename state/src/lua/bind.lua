-- Binds devices to connections, each if its attempt is newer. Every operation is a step of its own: one that fails
-- answers for itself.
-- KEYS: of each operation its route bucket (hash: user -> entries of 20 bytes: device 4, attempt 8, connection 8, big-endian)
-- ARGV: 1 devices at most, 2 events that a stream of who comes and goes keeps (0: there is none); then of each operation user, device (4 bytes), attempt (8 bytes), connection (8 bytes),
--       attempt in digits, when its token was issued (Unix seconds; 0: it has none)
-- Revocations (revoke.lua) stand in a key of the same slot, which is asked for those that have a token.
-- Returns of each operation 1 (bound, nobody had to go), {'bound', connection replaced or '', connection evicted or ''},
-- {'stale', attempt stored}, {'revoked'} or {'retired'} (retire.lua).
local call, sub, number = redis.pcall, string.sub, struct.unpack
local most = tonumber(ARGV[1])

local function bind(key, user, device, attempt, connection, mine, issued)
  if issued > 0 then
    local before = call('HMGET', 'revoked:{' .. key .. '}:' .. user, '', device)
    if before.err then return before end
    if issued < tonumber(before[1] or '0') or issued < tonumber(before[2] or '0') then return {'revoked'} end
  end
  local row = call('HGET', key, user) or ''
  if type(row) == 'table' then return row end
  if #row % 20 == 1 then return {'retired'} end
  local others, replaced, evicted = {}, '', ''
  for at = 1, #row, 20 do
    if sub(row, at, at + 3) == device then
      local stored, to = number('>I8', row, at + 4), sub(row, at + 12, at + 19)
      if stored > mine or (stored == mine and to ~= connection) then
        return {'stale', string.format('%.0f', stored)}
      end
      if to ~= connection then replaced = to end
    else
      others[#others + 1] = sub(row, at, at + 19)
    end
  end
  if #others >= most then
    local oldest, least = 1, math.huge
    for at, entry in ipairs(others) do
      local stored = number('>I8', entry, 5)
      if stored < least then oldest, least = at, stored end
    end
    evicted = sub(table.remove(others, oldest), 13, 20)
  end
  local entry = device .. attempt .. connection
  if #others > 0 then entry = table.concat(others) .. entry end
  local done = call('HSET', key, user, entry)
  if type(done) == 'table' then return done end
  if row == '' then tell(user, '1', ARGV[2]) end
  if replaced == '' and evicted == '' then return 1 end
  return {'bound', replaced, evicted}
end

local answers = {}
for i, key in ipairs(KEYS) do
  local at = 6 * i - 3
  answers[i] = bind(key, ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5]))
end
return answers
