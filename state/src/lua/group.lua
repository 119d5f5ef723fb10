-- What may be said in a group, and what it changes there: `decide` and `may_edit` of group.rs, in the language of Redis. Stands
-- in front of append.lua and reads its KEYS and ARGV. Behind 16, what changes: 17 title, 18 members that the group may
-- have, then of each who is named user, number, role.
-- A row of a member: "role number joined left", left 0 while they are in it. Of whoever comes back, the field p:USER of the chat tells the
-- stays before: "joined left joined left", PAST_STAYS_MAX of them.

local function standing(row, deleted)
  if not row then return nil end
  local role, number, joined, left = string.match(row, '^(%d+) (%d+) (%d+) (%d+)$')
  return {role = tonumber(role), number = number, joined = joined, left = left, within = left == '0' and not deleted}
end

local function row(role, number, joined, left)
  return string.format('%d', role) .. ' ' .. number .. ' ' .. joined .. ' ' .. left
end

-- A refusal ('0': none), the group's version, and what is to be written once the message is.
local function change()
  local at = redis.call('HMGET', KEYS[1], 'seq', 'gv', 'gn', 'gr', 'gd')
  local seq = string.format('%.0f', (tonumber(at[1]) or 0) + 1)
  local version, count, rows, deleted = at[2] or '0', tonumber(at[3]) or 0, tonumber(at[4]) or 0, at[5]
  local function find(user) return standing(redis.call('HGET', KEYS[6], user), deleted) end
  local action, most = tonumber(ARGV[16]), tonumber(ARGV[18])
  local effect = {fields = {}, rows = {}}
  local function put(field, value)
    effect.fields[#effect.fields + 1] = field
    effect.fields[#effect.fields + 1] = value
  end
  local function done()
    put('gn', string.format('%.0f', count))
    put('gr', string.format('%.0f', rows))
    return '0', version, effect
  end
  if action == 1 then
    if seq ~= '1' then return '26' end
    for i = 19, #ARGV, 3 do
      effect.rows[ARGV[i]] = row(ARGV[i + 2], ARGV[i + 1], seq, '0')
      count = count + 1
    end
    if count > most then return '27' end
    rows = count
    put('gt', ARGV[17])
    return done()
  end
  local me = find(ARGV[3])
  if not me or not me.within then return '21' end
  if action == 0 then return '0', version end
  local leads = me.role > 0
  if action == 2 and leads then
    put('gt', ARGV[17])
  elseif action == 3 and leads then
    for i = 19, #ARGV, 3 do
      if tonumber(ARGV[i + 2]) >= me.role then return '28' end
      local known = find(ARGV[i])
      if not (known and known.within) then
        if known and known.number ~= ARGV[i + 1] then
          -- The name was another's.
          put('p:' .. ARGV[i], '')
        elseif known then
          local past = (redis.call('HGET', KEYS[1], 'p:' .. ARGV[i]) or '') .. ' ' .. known.joined .. ' ' .. known.left
          local _, spaces = string.gsub(past, ' ', '')
          while spaces > 32 do
            past, spaces = string.gsub(past, '^ %d+ %d+', ''), spaces - 2
          end
          put('p:' .. ARGV[i], past)
        else
          rows = rows + 1
        end
        count = count + 1
        effect.rows[ARGV[i]] = row(ARGV[i + 2], ARGV[i + 1], seq, '0')
      end
    end
    if count > most or rows > 2 * most then return '27' end
  elseif action == 4 and leads then
    for i = 19, #ARGV, 3 do
      local known = find(ARGV[i])
      if known and known.within then
        if known.role >= me.role then return '28' end
        count = count - 1
        effect.rows[ARGV[i]] = row(known.role, known.number, known.joined, seq)
      end
    end
  elseif action == 5 and (me.role < 2 or count == 1) then
    count = count - 1
    effect.rows[ARGV[3]] = row(me.role, me.number, me.joined, seq)
  elseif action == 6 and me.role == 2 then
    if ARGV[19] == ARGV[3] then return '29' end
    local known = find(ARGV[19])
    if not known or not known.within then return '29' end
    effect.rows[ARGV[19]] = row(ARGV[21], known.number, known.joined, '0')
    if ARGV[21] == '2' then effect.rows[ARGV[3]] = row(1, me.number, me.joined, '0') end
  elseif action == 7 and me.role == 2 then
    put('gd', seq)
    count = 0
  else
    return '28'
  end
  return done()
end

-- A refusal unless the message that is referred to is the sender's, and one that can be edited.
local function editable()
  local seq = ARGV[14] .. '-0'
  local meant = redis.call('XRANGE', KEYS[3], seq, seq)[1]
  local since = redis.call('HGET', KEYS[1], 's:' .. ARGV[3])
  -- Of somebody who had this name before.
  if not meant or (since and tonumber(ARGV[14]) <= tonumber(since)) then return '29' end
  if meant[2][2] ~= ARGV[3] then return '28' end
  local kind = meant[2][9] == 'kind' and meant[2][10] or '0'
  if kind ~= '0' and kind ~= '4' then return '29' end
  return '0'
end

