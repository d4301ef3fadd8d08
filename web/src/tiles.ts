// Where tiles and pictures lie. Pure.
import type { Mosaic, Polygon, Position } from './types'

/** Order the corners of a place as a picture has them: top left, top right, bottom right, bottom left. */
export function pictureCorners(outline: Polygon): [Position, Position, Position, Position] {
  const ring = (outline.coordinates[0] ?? []).slice(0, -1)
  const corner = (dx: number, dy: number): Position => ring.reduce((a, b) => (b[0] * dx + b[1] * dy > a[0] * dx + a[1] * dy ? b : a), ring[0] ?? [0, 0])
  return [corner(-1, 1), corner(1, 1), corner(1, -1), corner(-1, -1)]
}

/** Write the address of the mosaic's tiles; MapLibre needs all of it, and finds the braces unchanged. */
export function tileUrl(template: string, mosaic: Mosaic, base: string): string {
  const choice = mosaic.mode === 'best' ? '' : `&${mosaic.mode}=${mosaic.date}`
  const full = /^[a-z]+:/.test(template) ? template : new URL('.', base).href + template.replace(/^\.?\//, '')
  return `${full}${full.includes('?') ? '&' : '?'}size=512${choice}`
}
