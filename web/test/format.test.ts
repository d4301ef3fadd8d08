import { describe, expect, it } from 'vitest'
import { boxArea, boxOf } from '../src/box'
import { acquisitionsAt, distinctCredits, formatAcquisition, formatBytes, formatDay, formatMeasure, formatPosition, formatQuery, formatScore, formatTime, inBox, plural, shortPlace } from '../src/format'
import { pictureCorners, tileUrl } from '../src/tiles'
import type { Acquisition } from '../src/types'

describe('words', () => {
  it.each([[1, 'chip', '1 chip'], [0, 'chip', '0 chips'], [1234, 'box', '1,234 boxes'], [2, 'city', '2 cities'], [2, 'day', '2 days']])('%i %s', (n, word, text) => { expect(plural(n, word)).toBe(text) })
  it('days are days, whatever the clock says', () => {
    expect(formatDay('2021-08-22')).toBe('22 Aug 2021')
    expect(formatDay('2021-08-22T23:59:59Z')).toBe('22 Aug 2021')
    expect([formatDay(null), formatDay('soon')]).toEqual(['unknown date', 'unknown date'])
  })
  it('numbers', () => {
    expect(formatScore(-0.1234)).toBe('−0.123')
    expect([formatMeasure({ measure: 0.004, unit: 'share' }), formatMeasure({ measure: 0.35, unit: 'share' }), formatMeasure({ measure: 81.6, unit: 'm' }), formatMeasure({ measure: null })]).toEqual(['< 1 %', '35 %', '82 m', ''])
    expect(formatPosition(-0.5, 51.25)).toBe('51.25000° N, 0.50000° W')
    expect([formatTime(0.2), formatTime(12.4), formatTime(1234), formatTime(20423)]).toEqual(['1 ms', '12 ms', '1.2 s', '20 s'])
    expect([formatBytes(20 * 2 ** 20), formatBytes(2048), formatBytes(7)]).toEqual(['20 MB', '2 kB', '7 bytes'])
  })
  it('names of chips', () => {
    expect(shortPlace('Z33-03111112303012222_10300100AF9D21DB.jpg')).toBe('Z33-…012222')
    expect(formatQuery('like Z33-03111112303012222_10300100AF9D21DB Z33-03111112303012221; water')).toBe('like Z33-…012222 Z33-…012221; water')
  })
  it('credits are said once, and at full length', () => {
    expect(distinctCredits(['© OSM, ODbL', 'Imagery © X', '© OSM, ODbL 1.0', ' Imagery © X ', ''])).toEqual(['Imagery © X', '© OSM, ODbL 1.0'])
  })
})

describe('boxes', () => {
  it('hold what lies in them, also across the antimeridian', () => {
    expect([inBox([1, 2, 3, 4], 2, 3), inBox([1, 2, 3, 4], 0, 3), inBox([179, -1, -179, 1], 180, 0), inBox([179, -1, -179, 1], 181, 0), inBox([179, -1, -179, 1], 0, 0)]).toEqual([true, false, true, true, false])
  })
  it('are made of two corners in any order', () => {
    expect(boxOf([3, 4], [1, 2])).toEqual([1, 2, 3, 4])
    expect(boxOf([179, 0], [181, 1])).toEqual([179, 0, -179, 1])
    expect(boxOf([170, 0], [180, 1])).toEqual([170, 0, 180, 1])
    expect(boxOf([1, 1], [1, 2])).toBeNull()
    expect(boxOf([-300, 0], [100, 1])).toEqual([-180, 0, 180, 1])
    expect(boxArea([179, 0, -179, 1]).coordinates[0]).toContainEqual([181, 0])
  })
})

describe('acquisitions', () => {
  const a = (date: string, bounds: Acquisition['bounds'] = [0, 0, 1, 1]): Acquisition => ({ catalog_id: date, date, bounds, sensor: 'WV02', off_nadir: 27.2, clear: 0.94 })
  const all = [a('2019-05-09'), a('2021-08-22'), a('2023-01-01', [5, 5, 6, 6])]
  it('on top is the newest that may be shown here', () => {
    expect(acquisitionsAt(all, { mode: 'until', date: '2022-01-01' }, 0.5, 0.5).map((o) => o.date)).toEqual(['2021-08-22', '2019-05-09'])
    expect(acquisitionsAt(all, { mode: 'on', date: '2019-05-09' }, 0.5, 0.5).map((o) => o.date)).toEqual(['2019-05-09'])
    expect(acquisitionsAt(all, { mode: 'until', date: '2018-01-01' }, 0.5, 0.5)).toEqual([])
    expect(acquisitionsAt(all, { mode: 'best' }, 5.5, 5.5).map((o) => o.date)).toEqual(['2023-01-01'])
  })
  it('are told in a line', () => { expect(formatAcquisition(all[1] as Acquisition)).toBe('22 Aug 2021 · WV02 · 27° off-nadir · 94 % clear') })
})

describe('addresses of tiles', () => {
  const base = 'http://host/user/x/proxy/8080/?token=1#at=1'
  it('stay below the page, braces and all', () => {
    expect(tileUrl('tiles/{z}/{x}/{y}.webp?v=a', { mode: 'best' }, base)).toBe('http://host/user/x/proxy/8080/tiles/{z}/{x}/{y}.webp?v=a&size=512')
    expect(tileUrl('./tiles/{z}/{x}/{y}.webp', { mode: 'until', date: '2019-05-09' }, base)).toBe('http://host/user/x/proxy/8080/tiles/{z}/{x}/{y}.webp?size=512&until=2019-05-09')
  })
  it('corners of a place come in the order of a picture, however the ring runs', () => {
    const want = [[0, 2], [2, 2.1], [2.1, 0], [0.1, -0.1]]
    const ring = [[2.1, 0], [2, 2.1], [0, 2], [0.1, -0.1], [2.1, 0]] as [number, number][]
    expect(pictureCorners({ type: 'Polygon', coordinates: [ring] })).toEqual(want)
    expect(pictureCorners({ type: 'Polygon', coordinates: [ring.toReversed()] })).toEqual(want)
  })
})
