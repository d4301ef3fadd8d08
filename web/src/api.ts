// The server, typed. Every address is relative to the page.
import type { SearchBody } from './query'
import type { Config, Judgement, Place, SearchAnswer, Subject, Suggestion, Uploaded, Verdict } from './types'

export class ApiError extends Error {
  readonly status: number
  readonly code: string
  readonly retryAfter: number | null
  constructor(status: number, code: string, message: string, retryAfter: number | null = null) {
    super(message)
    this.status = status
    this.code = code
    this.retryAfter = retryAfter
  }
}

const query = (of: Record<string, string | number | null | undefined>): string => {
  const p = new URLSearchParams()
  for (const [k, v] of Object.entries(of)) if (v !== null && v !== undefined && v !== '') p.set(k, String(v))
  const text = p.toString()
  return text ? `?${text}` : ''
}

async function problem(r: Response): Promise<ApiError> {
  let code = 'internal'
  let message = `the server answered ${r.status}`
  try {
    const body: unknown = await r.json()
    const e = (body as { error?: { code?: unknown; message?: unknown } } | null)?.error
    if (typeof e?.code === 'string') code = e.code
    if (typeof e?.message === 'string' && e.message) message = e.message
  } catch { /* not JSON: a proxy speaks, not our server */ }
  const wait = Number(r.headers.get('Retry-After'))
  return new ApiError(r.status, r.status === 401 ? 'unauthorized' : code, message, Number.isFinite(wait) && wait > 0 ? wait : null)
}

async function call<T>(path: string, init: RequestInit = {}): Promise<T> {
  let r: Response
  try {
    r = await fetch(path, { credentials: 'same-origin', ...init, headers: { Accept: 'application/json', ...init.headers } })
  } catch (e) {
    if (e instanceof DOMException && e.name === 'AbortError') throw e
    throw new ApiError(0, 'offline', 'the server does not answer; is it still running?')
  }
  if (!r.ok) throw await problem(r)
  if (r.status === 204) return undefined as T
  try { return (await r.json()) as T } catch (e) {
    if (e instanceof DOMException && e.name === 'AbortError') throw e
    throw new ApiError(r.status, 'internal', 'the answer is not what the server should send')
  }
}

const post = (body: unknown, signal?: AbortSignal): RequestInit =>
  ({ method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body), ...(signal && { signal }) })

export interface Where { schema: string | null; collection: string | null }

export const api = {
  config: (): Promise<Config> => call('api/config'),
  at: (lon: number, lat: number, date: string | null, where: Where, signal: AbortSignal): Promise<Place> =>
    call(`api/at${query({ lon: lon.toFixed(7), lat: lat.toFixed(7), date, ...where })}`, { signal }),
  chip: (chip: string, where: Where, signal: AbortSignal): Promise<Place> => call(`api/chip/${encodeURIComponent(chip)}${query({ ...where })}`, { signal }),
  search: (body: SearchBody, signal: AbortSignal): Promise<SearchAnswer> => call('api/search', post(body, signal)),
  upload: (file: Blob, name: string): Promise<Uploaded> => {
    const form = new FormData()
    form.append('file', file, name)
    return call('api/upload', { method: 'POST', body: form })
  },
  labels: (place: string, signal: AbortSignal): Promise<GeoJSON.FeatureCollection> => call(`api/labels/${encodeURIComponent(place)}`, { signal }),
  suggestions: (where: Where): Promise<{ suggestions: Suggestion[] }> => call(`api/examples${query({ ...where })}`),
  verdicts: (where: Where): Promise<{ verdicts: Verdict[]; total: number }> => call(`api/verdicts${query({ ...where })}`),
  judge: (chip: string, verdict: Judgement, subject: Subject, where: Where): Promise<Verdict> =>
    call('api/verdicts', post({ chip, verdict, ...subject, ...(where.schema && { schema: where.schema }), ...(where.collection && { collection: where.collection }) })),
  forget: (id: string, where: Where): Promise<unknown> => call(`api/verdicts/${encodeURIComponent(id)}${query({ ...where })}`, { method: 'DELETE' }),
  /** Hand the token over once; the server answers with a cookie. */
  enter: async (token: string): Promise<void> => {
    const r = await fetch(`./${query({ token })}`, { credentials: 'same-origin', cache: 'no-store' })
    if (!r.ok) throw await problem(r)
  },
}

export const url = {
  image: (chip: string, px: number): string => `api/chip/${encodeURIComponent(chip)}/image${query({ px })}`,
  heat: (chip: string, name: string, where: Where): string => `api/chip/${encodeURIComponent(chip)}/heat${query({ class: name, ...where })}`,
  verdicts: (format: 'geojson' | 'csv' | 'jsonl', where: Where): string => `api/verdicts/export${query({ format, ...where })}`,
}

export const wasAborted = (e: unknown): boolean => e instanceof DOMException && e.name === 'AbortError'
export const messageOf = (e: unknown): string => (e instanceof Error ? e.message : String(e))
