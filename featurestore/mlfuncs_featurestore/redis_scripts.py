"""The Lua scripts that make online writes atomic.

Owns: NEWEST (newest row wins), APPEND (events of one entity), SWAP (replace what was read). Little-endian layouts are
those of `rows` and `stream_windows`. Lua numbers are doubles: 64-bit numbers are compared by halves, so that no two
stamps are taken for equal.
"""

from __future__ import annotations

from mlfuncs_featurestore.ahead import LIMIT, MAGIC

# The (event time, created time, sequence) at bytes 5..28 decide; an equal stamp is written again, so that the later
# write of a correction at the same timestamp counts. The last ARGV is the writer's clock: a row that is ahead of it is
# kept beside the one before it (see `ahead`). Returns how many rows were written.
NEWEST = f"""
local unpack_number, call, sub, byte = struct.unpack, redis.call, string.sub, string.byte
local now_low, now_high = unpack_number('<I4i4', ARGV[#KEYS + 1])
local function is_ahead(row)
  local low, high = unpack_number('<I4i4', row, 5)
  return high > now_high or (high == now_high and low > now_low)
end
local function wins(new, old)
  for at = 5, 21, 8 do
    local low_a, high_a = unpack_number('<I4i4', new, at)
    local low_b, high_b = unpack_number('<I4i4', old, at)
    if high_a ~= high_b then return high_a > high_b end
    if low_a ~= low_b then return low_a > low_b end
  end
  return true
end
local function holds_several(value)
  return sub(value, 1, 4) == '{MAGIC.decode()}'
end
local function rows_in(value)
  if not value then return {{''}} end
  if not holds_several(value) then return {{value}} end
  local rows, at = {{}}, 5
  while at <= #value do
    local size = unpack_number('<I4', value, at)
    rows[#rows + 1] = sub(value, at + 4, at + 3 + size)
    at = at + 4 + size
  end
  return rows
end
local function with_row(value, row)
  local rows, place = rows_in(value), 1
  while place <= #rows and rows[place] ~= '' and not wins(row, rows[place]) do place = place + 1 end
  if place > #rows then return nil end
  if rows[place] ~= '' and wins(rows[place], row) then
    rows[place] = row
  else
    table.insert(rows, place, row)
  end
  local keep = 1
  while keep < #rows and is_ahead(rows[keep]) do keep = keep + 1 end
  if keep == 1 then return rows[1] end
  local parts = {{'{MAGIC.decode()}'}}
  for i = 1, math.min(keep, {LIMIT}) do
    parts[2 * i], parts[2 * i + 1] = struct.pack('<I4', #rows[i]), rows[i]
  end
  return table.concat(parts)
end
local stored, put, n = call('MGET', unpack(KEYS)), {{}}, 0
for i = 1, #KEYS do
  local row, old, value = ARGV[i], stored[i], nil
  local low, high = unpack_number('<I4i4', row, 5)  -- this loop is what limits writes: the usual cases are in place
  if high > now_high or (high == now_high and low > now_low) then
    value = with_row(old, row)
  elseif not old then
    value = row
  elseif byte(old) == {MAGIC[0]} and holds_several(old) then
    value = with_row(old, row)
  else
    local old_low, old_high = unpack_number('<I4i4', old, 5)
    if high == old_high and low == old_low then
      value = wins(row, old) and row
    elseif high > old_high or (high == old_high and low > old_low) then
      value = row
    end
  end
  if value then
    put[n + 1], put[n + 2] = KEYS[i], value
    n = n + 2
  end
end
if n > 0 then call('MSET', unpack(put)) end
return n / 2
"""

# ARGV[1] is the header of a new value, ARGV[2] the size below which nothing is compacted; the rest are the records
# to append. A value that is there gets the header's horizon (bytes 5..12) when it is the later one. The size after the
# last compaction is the u32 at bytes 13..16. Returns the numbers of the keys that have doubled since then.
APPEND = """
local call, header, least, grown = redis.call, ARGV[1], tonumber(ARGV[2]), {}
local horizon = string.sub(header, 5, 12)
local low, high = struct.unpack('<I4i4', horizon)
local raises = high ~= -2147483648 or low ~= 0
for i = 1, #KEYS do
  local size = call('APPEND', KEYS[i], ARGV[i + 2])
  if raises and size ~= #ARGV[i + 2] then
    local old_low, old_high = struct.unpack('<I4i4', call('GETRANGE', KEYS[i], 4, 11))
    if high > old_high or (high == old_high and low > old_low) then call('SETRANGE', KEYS[i], 4, horizon) end
  end
  if size == #ARGV[i + 2] then
    call('SET', KEYS[i], header .. ARGV[i + 2])
  elseif size > least and size > 2 * struct.unpack('<I4', call('GETRANGE', KEYS[i], 12, 15)) then
    grown[#grown + 1] = i
  end
end
return grown
"""

# Replaces the value whose SHA-1 is ARGV[1] by ARGV[2]; 0 when it changed meanwhile.
SWAP = """
local old = redis.call('GET', KEYS[1])
if not old or redis.sha1hex(old) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
