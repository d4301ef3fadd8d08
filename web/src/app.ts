// What the page can do, and what it knows at the moment. Panels draw it; this file draws nothing.
import { api, ApiError, messageOf, url, wasAborted, type Where } from './api'
import { addExample, chosen, exampleKey, isAsking, questionName, removeExample, searchBody, sideOf } from './query'
import { formatBytes, inBox, plural } from './format'
import { noQuestion, type Store } from './state'
import type { Config, CollectionInfo, Example, Judgement, Place, Polygon, Question, SearchAnswer, Subject, Suggestion, Verdict } from './types'

export type Remote<T> =
  | { status: 'idle' }
  | { status: 'loading'; before?: T }
  | { status: 'error'; message: string; retry: () => void }
  | { status: 'ready'; data: T }

export interface Live {
  place: Remote<Place>
  answer: Remote<SearchAnswer>
  answered: string
  subject: Subject | null // what verdicts on the answer are about
  verdicts: Remote<Verdict[]>
  features: GeoJSON.FeatureCollection | null
  faults: number
  hover: string | null
  drawing: 'box' | 'polygon' | null
  uploading: boolean
  suggestions: Suggestion[]
}

export interface Notice { text: string; bad?: boolean; action?: { label: string; run: () => void } }
export const dataOf = <T>(r: Remote<T>): T | null => (r.status === 'ready' ? r.data : r.status === 'loading' ? (r.before ?? null) : null)
export const sameSubject = (v: Verdict, s: Subject): boolean => ('class' in s ? v.class === s.class : v.query === s.query && !v.class)

export class App {
  readonly store: Store
  readonly config: Config
  live: Live = { place: { status: 'idle' }, answer: { status: 'idle' }, answered: '', subject: null, verdicts: { status: 'idle' }, features: null, faults: 0, hover: null, drawing: null, uploading: false, suggestions: [] }
  readonly outlines = new Map<string, Polygon>()
  #listeners: ((live: Live, before: Live) => void)[] = []
  #search = new AbortController()
  #open = new AbortController()
  #labels = new AbortController()
  notify: (notice: Notice) => void = () => undefined
  announce: (text: string) => void = () => undefined
  needToken: (again: () => void) => void = () => undefined
  reveal: (place: Place) => void = () => undefined
  showResults: (answer: SearchAnswer) => void = () => undefined
  push: () => void = () => undefined

  constructor(store: Store, config: Config) {
    this.store = store
    this.config = config
  }
  listen(listener: (live: Live, before: Live) => void): void { this.#listeners.push(listener) }
  know(change: Partial<Live>): void {
    const before = this.live
    this.live = { ...before, ...change }
    for (const listener of this.#listeners) listener(this.live, before)
  }

  get state() { return this.store.state }
  get question(): Question { return this.store.state.question }
  get collection(): CollectionInfo | null { return chosen(this.config, this.state)?.collection ?? null }
  where(): Where {
    const c = chosen(this.config, this.state)
    return { schema: c?.schema.name ?? null, collection: c?.collection.name ?? null }
  }
  titleOf(name: string): string { return this.config.classes.find((c) => c.name === name)?.title || name.replaceAll('_', ' ') }
  colourOf(name: string): string {
    const colour = this.collection?.class_colours?.[name] ?? this.config.classes.find((c) => c.name === name)?.colour ?? ''
    return /^#[0-9a-fA-F]{3,8}$/.test(colour) ? colour : '#8b95a1'
  }

  /** Tell what went wrong, and ask for the token where that is what is missing. */
  failed(e: unknown, again: () => void): { status: 'error'; message: string; retry: () => void } {
    if (e instanceof ApiError && e.status === 401) this.needToken(again)
    const wait = e instanceof ApiError && e.retryAfter ? `; try again in ${plural(e.retryAfter, 'second')}` : ''
    return { status: 'error', message: messageOf(e) + wait, retry: again }
  }

  // -- places

  async openAt(lon: number, lat: number): Promise<void> {
    const { acquisitions, bounds } = this.config
    const boxes = acquisitions.flatMap((a) => (a.bounds ? [a.bounds] : [])).concat(bounds && !acquisitions.some((a) => a.bounds) ? [bounds] : [])
    if (boxes.length && !boxes.some((b) => inBox(b, lon, lat))) { this.notify({ text: 'No imagery here.' }); return }
    const { mosaic } = this.state
    await this.#openPlace((signal) => api.at(lon, lat, mosaic.mode === 'best' ? null : mosaic.date, this.where(), signal), () => void this.openAt(lon, lat), true)
  }
  async openChip(chip: string, show = true): Promise<void> {
    this.store.set({ chip })
    await this.#openPlace((signal) => api.chip(chip, this.where(), signal), () => void this.openChip(chip, show), show)
  }
  async #openPlace(ask: (signal: AbortSignal) => Promise<Place>, again: () => void, show: boolean): Promise<void> {
    this.#open.abort()
    this.#open = new AbortController()
    const before = dataOf(this.live.place)
    this.know({ place: { status: 'loading', ...(before && { before }) } })
    try {
      const place = await ask(this.#open.signal)
      for (const c of place.chips) this.outlines.set(c.chip, place.outline)
      if (before?.place !== place.place) this.know({ features: null })
      this.know({ place: { status: 'ready', data: place } })
      this.store.set({ chip: place.chip, view: 'place' })
      this.push()
      if (show) this.reveal(place)
    } catch (e) {
      if (wasAborted(e)) return
      if (e instanceof ApiError && e.status === 404) {
        this.know({ place: before ? { status: 'ready', data: before } : { status: 'idle' } })
        this.notify({ text: `${e.message[0]?.toUpperCase() ?? ''}${e.message.slice(1)}`, bad: true })
        if (!before) this.store.set({ chip: null })
      } else {
        this.know({ place: this.failed(e, again) })
        this.store.set({ view: 'place' })
      }
    }
  }
  closePlace(): void {
    this.#open.abort()
    this.know({ place: { status: 'idle' }, features: null })
    this.store.set({ chip: null, heat: null, view: this.state.view === 'place' ? 'search' : this.state.view })
    this.push()
  }
  setHeat(name: string | null): void { this.store.set({ heat: name }) }
  heatUrl(): string | null {
    const { chip, heat } = this.state
    return chip && heat && this.collection?.heat && this.collection.classes.includes(heat) ? url.heat(chip, heat, this.where()) : null
  }
  async toggleFeatures(): Promise<void> {
    this.#labels.abort()
    if (this.live.features) { this.know({ features: null }); return }
    const place = dataOf(this.live.place)
    if (!place) return
    this.#labels = new AbortController()
    try {
      const features = await api.labels(place.place, this.#labels.signal)
      this.know({ features })
      this.notify({ text: features.features.length ? `${plural(features.features.length, 'OpenStreetMap feature')} here` : 'OpenStreetMap has no features of these classes here.' })
    } catch (e) {
      if (!wasAborted(e)) this.notify({ text: this.failed(e, () => void this.toggleFeatures()).message, bad: true, action: { label: 'Retry', run: () => void this.toggleFeatures() } })
    }
  }

  // -- questions

  get changed(): boolean { return this.live.answered !== '' && this.live.answered !== JSON.stringify(searchBody(this.state)) }

  async ask(): Promise<void> {
    if (!this.collection) { this.notify({ text: 'No similarity schema is loaded, so there is nothing to search.', bad: true }); return }
    if (!isAsking(this.question)) { this.notify({ text: 'Nothing to look for yet: like a place, name classes or drop a picture.' }); return }
    this.#search.abort()
    this.#search = new AbortController()
    const body = searchBody(this.state)
    const before = dataOf(this.live.answer)
    this.know({ answer: { status: 'loading', ...(before && { before }) }, answered: JSON.stringify(body), subject: this.#subject() })
    this.store.set({ asked: true })
    this.push()
    try {
      const data = await api.search(body, this.#search.signal)
      for (const f of data.features) this.outlines.set(f.properties.chip, f.geometry)
      this.know({ answer: { status: 'ready', data } })
      this.announce(data.features.length ? `${plural(data.features.length, 'result')}` : 'No results')
      this.showResults(data)
    } catch (e) {
      if (!wasAborted(e)) this.know({ answer: this.failed(e, () => void this.ask()) })
    }
  }
  #subject(): Subject {
    const q = this.question
    return q.verdicts && !q.likes.length && !q.unlikes.length && !q.classes.trim() ? q.verdicts : { query: questionName(q) }
  }
  findSimilar(chip: string): void {
    this.store.set({ question: { ...noQuestion(), likes: [{ kind: 'chip', chip }], filters: this.question.filters, k: this.question.k }, lostPicture: false, view: 'search' })
    void this.ask()
  }
  toggleExample(chip: string, side: 'likes' | 'unlikes'): void {
    if (sideOf(this.question, chip) === side) this.dropExample(chip)
    else this.takeExample({ kind: 'chip', chip }, side)
  }
  takeExample(example: Example, side: 'likes' | 'unlikes'): void {
    if (this.question.likes.length + this.question.unlikes.length >= this.config.limits.examples) {
      this.notify({ text: `More than ${plural(this.config.limits.examples, 'example')} can't be asked at once.`, bad: true })
      return
    }
    this.store.set({ question: addExample(this.question, example, side) })
    this.announce(side === 'likes' ? 'Liked' : 'Disliked')
  }
  dropExample(key: string): void { this.store.set({ question: removeExample(this.question, key) }) }
  otherSide(example: Example): void {
    const liked = this.question.likes.some((e) => exampleKey(e) === exampleKey(example))
    this.takeExample(example, liked ? 'unlikes' : 'likes')
  }
  clearQuestion(): void {
    this.#search.abort()
    this.store.set({ question: { ...noQuestion(), filters: this.question.filters, k: this.question.k }, asked: false, lostPicture: false })
    this.know({ answer: { status: 'idle' }, answered: '' })
    this.push()
  }
  askVerdicts(subject: Subject): void {
    this.store.set({ question: { ...noQuestion(), verdicts: subject, filters: this.question.filters, k: this.question.k }, view: 'search' })
    void this.ask()
  }

  async addPicture(file: File | Blob, name: string): Promise<void> {
    const { upload_bytes: most } = this.config.limits
    if (!this.collection) { this.notify({ text: 'No similarity schema is loaded, so a picture can\'t be looked for.', bad: true }); return }
    if (file.type && !file.type.startsWith('image/')) { this.notify({ text: `${name} is not a picture.`, bad: true }); return }
    if (file.size > most) { this.notify({ text: `${name} has ${formatBytes(file.size)}; ${formatBytes(most)} are the most.`, bad: true }); return }
    this.know({ uploading: true })
    this.store.set({ view: 'search' })
    const first = !isAsking(this.question)
    try {
      const up = await api.upload(file, name)
      const thumb = up.thumb.startsWith('data:image/') ? up.thumb : ''
      this.takeExample({ kind: 'picture', id: up.image_id, thumb, name }, 'likes')
      this.store.set({ lostPicture: false })
      this.know({ uploading: false })
      if (first) void this.ask()
    } catch (e) {
      this.know({ uploading: false })
      this.notify({ text: this.failed(e, () => void this.addPicture(file, name)).message, bad: true, action: { label: 'Retry', run: () => void this.addPicture(file, name) } })
    }
  }

  /** Fetch classes that are worth asking for; without them the page offers all classes. */
  async loadSuggestions(): Promise<void> {
    if (!this.collection) return
    try { this.know({ suggestions: (await api.suggestions(this.where())).suggestions }) } catch { this.know({ suggestions: [] }) }
  }
  /** Search in another collection: chips of the one before mean nothing there. */
  useCollection(schema: string, collection: string): void {
    this.store.set({ schema, collection, heat: null })
    this.clearQuestion()
    this.closePlace()
    this.know({ suggestions: [], verdicts: { status: 'idle' } })
    void this.loadVerdicts()
    void this.loadSuggestions()
  }

  // -- verdicts

  /** Name what verdicts on the present question are about. */
  subject(): Subject | null {
    return dataOf(this.live.answer) ? this.live.subject : null
  }
  verdictOf(chip: string, subject: Subject | null): Verdict | null {
    return subject ? (dataOf(this.live.verdicts)?.find((v) => v.chip === chip && sameSubject(v, subject)) ?? null) : null
  }
  async loadVerdicts(): Promise<void> {
    if (!this.config.verdicts || !this.collection) return
    const before = dataOf(this.live.verdicts)
    this.know({ verdicts: { status: 'loading', ...(before && { before }) } })
    try {
      const { verdicts: list } = await api.verdicts(this.where())
      this.know({ verdicts: { status: 'ready', data: list.toSorted((a, b) => (b.at ?? '').localeCompare(a.at ?? '')) } })
    } catch (e) { this.know({ verdicts: this.failed(e, () => void this.loadVerdicts()) }) }
  }
  async judge(chip: string, verdict: Judgement, subject: Subject): Promise<void> {
    try {
      const old = this.verdictOf(chip, subject)
      if (old?.verdict === verdict) { await this.forget(old); return }
      const stored = await api.judge(chip, verdict, subject, this.where())
      const rest = (dataOf(this.live.verdicts) ?? []).filter((v) => v.id !== stored.id && !(v.chip === chip && sameSubject(v, subject)))
      this.know({ verdicts: { status: 'ready', data: [stored, ...rest] } })
      this.announce(`Saved: ${verdict}`)
    } catch (e) {
      this.notify({ text: `Not saved: ${this.failed(e, () => void this.judge(chip, verdict, subject)).message}`, bad: true, action: { label: 'Retry', run: () => void this.judge(chip, verdict, subject) } })
    }
  }
  async forget(v: Verdict): Promise<void> {
    try {
      await api.forget(v.id, this.where())
      this.know({ verdicts: { status: 'ready', data: (dataOf(this.live.verdicts) ?? []).filter((o) => o.id !== v.id) } })
      this.announce('Verdict removed')
    } catch (e) {
      this.notify({ text: `Not removed: ${this.failed(e, () => void this.forget(v)).message}`, bad: true, action: { label: 'Retry', run: () => void this.forget(v) } })
    }
  }
}
