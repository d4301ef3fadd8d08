// Boxes that are drawn. Pure.
import type { LonLatBox, Polygon, Position } from './types'

const wrap = (x: number): number => ((((x + 180) % 360) + 360) % 360) - 180

/** Make a box of two corners; null where it has no size. */
export function boxOf([x0, y0]: Position, [x1, y1]: Position): LonLatBox | null {
  const [west, east] = [Math.min(x0, x1), Math.max(x0, x1)]
  const [south, north] = [Math.max(-90, Math.min(y0, y1)), Math.min(90, Math.max(y0, y1))]
  if (east - west <= 0 || north - south <= 0) return null
  return east - west >= 360 ? [-180, south, 180, north] : [wrap(west), south, wrap(east) === -180 ? 180 : wrap(east), north]
}

/** Draw a box as an area; across the antimeridian it goes on to the east. */
export function boxArea([w, s, e, n]: LonLatBox): Polygon {
  const east = e < w ? e + 360 : e
  return { type: 'Polygon', coordinates: [[[w, s], [east, s], [east, n], [w, n], [w, s]]] }
}
