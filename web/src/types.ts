// What the server says, and what the page remembers.

export type LonLatBox = [west: number, south: number, east: number, north: number]
export type Position = [lon: number, lat: number]

export interface Polygon { type: 'Polygon'; coordinates: Position[][] }

export interface Acquisition {
  catalog_id: string
  date: string
  sensor?: string | null
  off_nadir?: number | null
  clear?: number | null
  sun_elevation?: number | null
  cells?: number
  bounds?: LonLatBox | null
}

export interface CollectionInfo {
  name: string
  chips: number
  generation?: number
  classes: string[]
  class_colours?: Record<string, string>
  encoder?: string
  heat?: boolean
  exact?: boolean
  recall?: Record<string, unknown> | null
}

export interface SchemaInfo { name: string; collections: CollectionInfo[] }

export interface ClassInfo { name: string; title?: string | null; colour: string }

export interface Config {
  version: string
  title?: string | null
  credits: string[]
  bounds: LonLatBox | null
  center: [number, number, number] | null
  tiles: { url: string; min_zoom: number; max_zoom: number }
  dates: string[]
  acquisitions: Acquisition[]
  schemas: SchemaInfo[]
  classes: ClassInfo[]
  limits: { k: number; upload_bytes: number; upload_pixels: number; examples: number }
  labels: boolean
  verdicts: boolean
}

export type LabelState = 'present' | 'absent' | 'unmapped'

export interface Label {
  class: string
  title?: string | null
  colour?: string | null
  state: LabelState
  measure?: number | null
  unit?: 'share' | 'm'
  threshold?: number | null
}

export interface Probability { class: string; p: number; threshold?: number | null }

export interface ChipAtDate {
  chip: string
  date: string
  catalog_id: string
  off_nadir?: number | null
  clear?: number | null
  valid?: number | null
  indexed: boolean
}

export interface Place {
  place: string
  cell?: string
  lon: number
  lat: number
  outline: Polygon
  chips: ChipAtDate[]
  chip: string
  labels: Label[] | null
  probs: Probability[] | null
}

export interface ResultProperties {
  chip: string
  place: string
  score: number
  date: string | null
  catalog_id: string
  lon: number
  lat: number
  rank: number
  probs?: Probability[] | Record<string, number>
}

export interface ResultFeature { type: 'Feature'; id?: string | number; geometry: Polygon; properties: ResultProperties }

export interface SearchAnswer {
  type: 'FeatureCollection'
  features: ResultFeature[]
  query: { text: string }
  funnel: [string, number, ...unknown[]][]
  score: { name: string; range: [number, number] }
  credits: string[]
  took_ms?: number
  exact?: boolean
  total: number
  note?: string | null
}

export interface Uploaded { image_id: string; width: number; height: number; thumb: string }

export interface Suggestion { class: string; title?: string | null; colour?: string | null; chips: number; chip: string }

export type Judgement = 'yes' | 'no' | 'unsure'

export interface Verdict {
  id: string
  chip: string
  query?: string | null
  class?: string | null
  verdict: Judgement
  note?: string | null
  at?: string | null
}

// An example of what is wanted or not: a chip, or a picture that the server holds for a while.
export type Example =
  | { kind: 'chip'; chip: string }
  | { kind: 'picture'; id: string; thumb: string; name: string }

export interface Filters {
  since: string | null
  until: string | null
  zone: number | null
  clear: number | null
  offNadir: number | null
  box: LonLatBox | null
  polygon: Polygon | null
  oneAPlace: boolean
  otherPlace: boolean
  where: string
}

export type Subject = { query: string } | { class: string }

export interface Question {
  likes: Example[]
  unlikes: Example[]
  classes: string
  verdicts: Subject | null
  filters: Filters
  k: number
}

export type Mosaic = { mode: 'best' } | { mode: 'until' | 'on'; date: string }

export type View = 'search' | 'place' | 'verdicts'

export interface State {
  center: Position | null
  zoom: number | null
  mosaic: Mosaic
  schema: string | null
  collection: string | null
  chip: string | null
  heat: string | null
  question: Question
  asked: boolean
  view: View
  lostPicture: boolean
}
