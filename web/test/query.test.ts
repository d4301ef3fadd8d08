import { describe, expect, it } from 'vitest'
import { addExample, chosen, completions, filterBody, filterWords, isAsking, questionName, removeExample, searchBody, sideOf } from '../src/query'
import { firstState, noFilters, noQuestion } from '../src/state'
import type { Config, Example } from '../src/types'

const chip = (n: number): Example => ({ kind: 'chip', chip: `Z33-0311111230301222${n}_10300100AF9D21DB.jpg` })
const picture: Example = { kind: 'picture', id: 'p1', thumb: '', name: 'mine.jpg' }

describe('what is sent', () => {
  it('says only what is set', () => {
    const s = firstState()
    s.question.likes = [chip(0), picture]
    s.question.unlikes = [chip(1)]
    s.question.classes = '  forest '
    s.question.filters = { ...noFilters(), clear: 0, oneAPlace: true, where: ' clear>0.5 ' }
    expect(searchBody({ ...s, schema: 'demo' })).toEqual({
      schema: 'demo', k: 20, like: ['Z33-03111112303012220_10300100AF9D21DB.jpg', { image_id: 'p1' }], unlike: ['Z33-03111112303012221_10300100AF9D21DB.jpg'], classes: 'forest', where: 'clear>0.5',
      filters: { clear: 0, one_a_place: true },
    })
    expect(searchBody(firstState())).toEqual({ k: 20 })
  })
  it('uses the words of the server', () => {
    expect(filterBody({ ...noFilters(), since: '2019-01-01', until: '2020-01-01', zone: 33, offNadir: 25, otherPlace: true, box: [1, 2, 3, 4] }))
      .toEqual({ since: '2019-01-01', until: '2020-01-01', zone: 33, off_nadir: 25, other_place: true, box: [1, 2, 3, 4] })
  })
})

describe('examples', () => {
  it('are on one side at a time', () => {
    let q = addExample(noQuestion(), chip(0), 'likes')
    q = addExample(q, picture, 'likes')
    q = addExample(q, chip(0), 'unlikes')
    expect([q.likes, q.unlikes]).toEqual([[picture], [chip(0)]])
    expect(sideOf(q, (chip(0) as { chip: string }).chip)).toBe('unlikes')
    expect(sideOf(q, 'other')).toBeNull()
    q = removeExample(removeExample(q, 'picture:p1'), (chip(0) as { chip: string }).chip)
    expect(isAsking(q)).toBe(false)
  })
  it('change nothing that was given', () => {
    const q = Object.freeze(noQuestion())
    addExample(q, chip(0), 'likes')
    expect(q.likes).toEqual([])
  })
})

describe('the name of a question', () => {
  it('tells questions apart, and fits', () => {
    const many = Array.from({ length: 9 }, (_, i) => chip(i))
    const a = questionName({ ...noQuestion(), likes: many, unlikes: [chip(0)] })
    const b = questionName({ ...noQuestion(), likes: many, unlikes: [chip(1)] })
    expect(a).not.toBe(b)
    expect([a.length, b.length]).toEqual([200, 200])
    expect(questionName({ ...noQuestion(), classes: 'forest' })).toBe('forest')
  })
})

describe('filters in words', () => {
  it('are as many as are set', () => {
    expect(filterWords(noFilters())).toEqual([])
    expect(filterWords({ ...noFilters(), clear: 0.9, box: [1, 2, 3, 4], where: ' x=1 ' }).map((w) => w.text)).toEqual(['in a box', 'clear ≥ 90 %', 'x=1'])
  })
})

describe('endings of classes', () => {
  const classes = ['forest', 'major_road', 'water', 'orchard_vineyard']
  it.each([['for', ['forest']], ['forest and wa', ['water']], ['no roa', ['major_road']], ['forest and ', []], ['forest', []], ['(VINE', ['orchard_vineyard']], ['no', []], ['', []]])('%s', (text, words) => {
    expect(completions(text, text.length, classes).words).toEqual(words)
  })
  it('looks at the word before the caret', () => { expect(completions('wat and forest', 3, classes)).toEqual({ start: 0, words: ['water'] }) })
})

describe('the collection', () => {
  const c = (name: string) => ({ name, chips: 1, classes: [] })
  const config = { schemas: [{ name: 'empty', collections: [] }, { name: 'a', collections: [c('x'), c('main')] }, { name: 'b', collections: [c('y')] }] } as unknown as Config
  it.each([[null, null, 'a/main'], ['b', null, 'b/y'], ['b', 'gone', 'b/y'], ['gone', 'x', 'a/x'], ['empty', null, 'a/main']])('%s, %s: %s', (schema, collection, want) => {
    const got = chosen(config, { schema, collection })
    expect(`${got?.schema.name}/${got?.collection.name}`).toBe(want)
  })
  it('may be none', () => { expect(chosen({ schemas: [] } as unknown as Config, { schema: null, collection: null })).toBeNull() })
})
