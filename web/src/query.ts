// From what is asked on the page to what is sent, and to words. Pure.
import { formatDegrees, formatShare } from './format'
import type { Config, CollectionInfo, Example, Filters, Question, SchemaInfo, State } from './types'

type Json = string | number | boolean | null | Json[] | { [key: string]: Json }
const MOST_NAME = 200 // characters that the server keeps
export type SearchBody = { [key: string]: Json }

/** Name an example in a way that no other has. */
export const exampleKey = (e: Example): string => (e.kind === 'chip' ? e.chip : `picture:${e.id}`)
const sent = (e: Example): Json => (e.kind === 'chip' ? e.chip : { image_id: e.id })

/** Give the filters in the server's words, only those that are set. */
export function filterBody(f: Filters): SearchBody {
  const out: SearchBody = {}
  if (f.since) out['since'] = f.since
  if (f.until) out['until'] = f.until
  if (f.zone !== null) out['zone'] = f.zone
  if (f.clear !== null) out['clear'] = f.clear
  if (f.offNadir !== null) out['off_nadir'] = f.offNadir
  if (f.box) out['box'] = f.box
  if (f.polygon) out['polygon'] = f.polygon as unknown as Json
  if (f.oneAPlace) out['one_a_place'] = true
  if (f.otherPlace) out['other_place'] = true
  return out
}

/** Tell whether there is something to look for. */
export const isAsking = (q: Question): boolean => q.likes.length + q.unlikes.length > 0 || q.classes.trim() !== '' || q.verdicts !== null

/** Write the body of a search. */
export function searchBody(s: State): SearchBody {
  const q = s.question
  const body: SearchBody = { k: q.k }
  if (s.schema) body['schema'] = s.schema
  if (s.collection) body['collection'] = s.collection
  if (q.likes.length) body['like'] = q.likes.map(sent)
  if (q.unlikes.length) body['unlike'] = q.unlikes.map(sent)
  if (q.classes.trim()) body['classes'] = q.classes.trim()
  if (q.verdicts) body['verdicts'] = q.verdicts
  if (q.filters.where.trim()) body['where'] = q.filters.where.trim()
  const filters = filterBody(q.filters)
  if (Object.keys(filters).length) body['filters'] = filters
  return body
}

/** Put an example on one side, and take it off the other. */
export function addExample(q: Question, e: Example, side: 'likes' | 'unlikes'): Question {
  const key = exampleKey(e)
  const other = side === 'likes' ? 'unlikes' : 'likes'
  return { ...q, [other]: q[other].filter((o) => exampleKey(o) !== key), [side]: [...q[side].filter((o) => exampleKey(o) !== key), e] }
}
export function removeExample(q: Question, key: string): Question {
  return { ...q, likes: q.likes.filter((e) => exampleKey(e) !== key), unlikes: q.unlikes.filter((e) => exampleKey(e) !== key) }
}
export function sideOf(q: Question, chip: string): 'likes' | 'unlikes' | null {
  const has = (list: Example[]): boolean => list.some((e) => e.kind === 'chip' && e.chip === chip)
  return has(q.likes) ? 'likes' : has(q.unlikes) ? 'unlikes' : null
}

export interface FilterWord { key: keyof Filters; text: string }

/** Say which filters are set, each in a few words. */
export function filterWords(f: Filters): FilterWord[] {
  const out: FilterWord[] = []
  if (f.since) out.push({ key: 'since', text: `since ${f.since}` })
  if (f.until) out.push({ key: 'until', text: `until ${f.until}` })
  if (f.box) out.push({ key: 'box', text: 'in a box' })
  if (f.polygon) out.push({ key: 'polygon', text: 'in an area' })
  if (f.clear !== null) out.push({ key: 'clear', text: `clear ≥ ${formatShare(f.clear)}` })
  if (f.offNadir !== null) out.push({ key: 'offNadir', text: `off-nadir ≤ ${formatDegrees(f.offNadir)}` })
  if (f.zone !== null) out.push({ key: 'zone', text: `zone ${f.zone}` })
  if (f.oneAPlace) out.push({ key: 'oneAPlace', text: 'one a place' })
  if (f.otherPlace) out.push({ key: 'otherPlace', text: 'other places' })
  if (f.where.trim()) out.push({ key: 'where', text: f.where.trim() })
  return out
}

/** Find the schema and the collection that the state means, or the first there is. */
export function chosen(config: Config, s: Pick<State, 'schema' | 'collection'>): { schema: SchemaInfo; collection: CollectionInfo } | null {
  const full = config.schemas.filter((o) => o.collections.length)
  const schema = full.find((o) => o.name === s.schema) ?? full[0]
  if (!schema) return null
  const collection = schema.collections.find((o) => o.name === s.collection) ?? schema.collections.find((o) => o.name === 'main') ?? schema.collections[0]
  return collection ? { schema, collection } : null
}

/** Offer the ends of the word that is being written in a line of classes. */
export function completions(text: string, caret: number, classes: readonly string[]): { start: number; words: string[] } {
  const before = text.slice(0, caret)
  const start = Math.max(...[',', '(', ')', ' '].map((c) => before.lastIndexOf(c))) + 1
  const word = before.slice(start).toLowerCase()
  if (!word || ['and', 'or', 'not', 'no', 'with', 'but', 'without'].includes(word)) return { start, words: [] }
  const hits = classes.filter((c) => c.toLowerCase().split('_').some((part) => part.startsWith(word)) || c.toLowerCase().startsWith(word))
  return { start, words: hits.filter((c) => c.toLowerCase() !== word).slice(0, 6) }
}

/** Name a question so that verdicts on it are told from those on others; filters are no part of it. */
export function questionName(q: Question): string {
  const name = (e: Example): string => (e.kind === 'chip' ? e.chip.replace(/\.jpg$/, '') : `picture ${e.name}`)
  const parts: string[] = []
  if (q.verdicts) parts.push(`verdicts on ${'class' in q.verdicts ? q.verdicts.class : q.verdicts.query}`)
  if (q.likes.length) parts.push(`like ${q.likes.map(name).join(' ')}`)
  if (q.unlikes.length) parts.push(`unlike ${q.unlikes.map(name).join(' ')}`)
  if (q.classes.trim()) parts.push(q.classes.trim())
  const text = parts.join('; ')
  return text.length > MOST_NAME ? `${text.slice(0, MOST_NAME - 11)}… #${fold(text)}` : text
}

/** Fold a text into eight hexadecimal digits (FNV-1a): what tells long names apart whose beginnings are alike. */
function fold(text: string): string {
  let x = 0x811c9dc5
  for (const byte of new TextEncoder().encode(text)) x = Math.imul(x ^ byte, 0x01000193) >>> 0
  return x.toString(16).padStart(8, '0')
}
