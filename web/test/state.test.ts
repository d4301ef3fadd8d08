import { describe, expect, it } from 'vitest'
import { asPolygon, firstState, isDay, noFilters, readHash, Store, writeHash } from '../src/state'
import type { State } from '../src/types'

const A = 'Z33-03111112303012222_10300100AF9D21DB.jpg'
const B = 'Z33-03111112303003331_103001009A624563.jpg'
const C = 'Z60-20000000000000000_a1b2-c3d4_visual.jpg'

const full = (): State => ({
  ...firstState(), center: [13.635259, -45.032796], zoom: 16.25, mosaic: { mode: 'on', date: '2019-05-09' }, schema: 'demo', collection: 'main', chip: A, heat: 'major_road', asked: true, view: 'verdicts',
  question: {
    likes: [{ kind: 'chip', chip: A }, { kind: 'chip', chip: C }], unlikes: [{ kind: 'chip', chip: B }], classes: 'forest & water, no "major road" = 50 % + 1 #?', verdicts: { query: 'like x, y' }, k: 55,
    filters: { since: '2019-01-01', until: '2021-12-31', zone: 33, clear: 0.85, offNadir: 25, box: null, polygon: asPolygon([[13.1, 45.1], [13.2, 45.1], [13.2, 45.3]]), oneAPlace: true, otherPlace: true, where: 'distance>500 and forest>=0.5' },
  },
})

describe('the link', () => {
  it('restores all of it', () => { expect(readHash(`#${writeHash(full())}`)).toEqual(full()) })
  it('is short when there is little to say', () => {
    expect(writeHash(firstState())).toBe('')
    expect(readHash('')).toEqual(firstState())
  })
  it('holds boxes, also across the antimeridian', () => {
    const s = full()
    s.question.filters = { ...noFilters(), box: [179.5, -17, -179.5, -16] }
    expect(readHash(writeHash(s)).question.filters).toEqual(s.question.filters)
  })
  it('remembers that there was a picture, which it cannot hold', () => {
    const s = firstState()
    s.question.likes = [{ kind: 'picture', id: 'abc', thumb: 'data:image/jpeg;base64,AA', name: 'my.jpg' }]
    expect(writeHash(s)).toBe('picture=1')
    expect(readHash('picture=1')).toEqual({ ...firstState(), lostPicture: true })
  })
  it.each([
    'at=1,2', 'at=1,95,3', 'at=a,b,c', 'on=2019-13-01', 'until=<script>', 'chip=../../etc/passwd', 'chip=Z33-0311_x/y', 'heat=<img>', 'schema=a/b', 'like=,,x,Z33-9999_a', 'box=1,2,3', 'box=1,5,2,4', 'box=1,2,3,4,5', 'area=1 2,3 4',
    'area=1 2,3 4,5', 'zone=0', 'zone=61', 'zone=1.5', 'clear=2', 'offnadir=-1', 'since=yesterday', 'view=admin', 'k=0', 'k=', 'k=1e9', '%E0%A4%A', '=', '&&&', 'constructor=1', '__proto__=1',
  ])('leaves out what makes no sense: %s', (hash) => { expect(readHash(hash)).toEqual(firstState()) })
  it('never likes and dislikes the same chip', () => {
    const name = A.replace('.jpg', '')
    const { likes, unlikes } = readHash(`like=${name},${name}&unlike=${name}`).question
    expect([likes.length, unlikes.length]).toEqual([1, 0])
  })
  it('bounds what it takes', () => {
    expect(readHash(`classes=${'x'.repeat(9000)}`).question.classes).toHaveLength(2000)
    expect(asPolygon(Array.from({ length: 500 }, (_, i) => [i / 10, 1]))).toBeNull()
  })
})

describe('days', () => {
  it.each([['2020-02-29', true], ['2021-02-29', false], ['2021-2-9', false], ['0000-00-00', false], ['20210101', false]])('%s', (text, good) => { expect(isDay(text)).toBe(good) })
})

describe('the store', () => {
  it('tells what was and what is', () => {
    const store = new Store(firstState())
    const seen: [number, number][] = []
    store.listen((now, before) => seen.push([before.question.k, now.question.k]))
    store.ask({ k: 5 })
    store.filter({ zone: 33 })
    expect(seen).toEqual([[20, 5], [5, 5]])
    expect(store.state.question.filters.zone).toBe(33)
  })
})
