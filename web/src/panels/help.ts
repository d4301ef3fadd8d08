// Dialogs: help, the token.
import { api, ApiError, messageOf } from '../api'
import type { App } from '../app'
import { fill, h, iconButton } from '../dom'

const KEYS: [string[], string][] = [
  [['/'], 'Write classes to search for'], [['?'], 'This help'], [['Esc'], 'Close, or end drawing'], [['[', ']'], 'Earlier, later date'], [['J', 'K'], 'Next, previous result'], [['Enter'], 'On the map: open the place in the middle'],
  [['S'], 'Find similar'], [['L', 'U'], 'Like, dislike'], [['A'], 'Ask (again)'], [['Y', 'N', 'M'], 'Verdict: yes, no, unsure'], [['H'], 'Where in the chip: next class'], [['B', 'P'], 'Draw a box, an outline'], [['V'], 'Verdicts'], [['C'], 'Copy a link to all this'], [['0'], 'Show all imagery'],
]
const CLASS_LINES: [string, string][] = [
  ['forest and water', 'both'], ['forest or grass', 'either'], ['forest, no major_road', 'the one without the other'], ['(houses or apartments) and water', 'brackets as usual'],
]
const WHERE_LINES: [string, string][] = [
  ['off_nadir<25 and clear>=0.9', 'view and clear share'], ['2019<=date<2022', 'years, months or days'], ['forest>0.8', 'probability of a class'], ['distance>500', 'metres from the examples'], ['not zone=33', 'turned round'],
]

function dialog(label: string, ...children: (Node | null)[]): HTMLDialogElement {
  const el = h('dialog.dialog', { 'aria-label': label }, ...children)
  el.addEventListener('click', (e) => { if (e.target === el) el.close() })
  return el
}

export function makeHelp(app: App): { el: HTMLDialogElement; open: () => void } {
  const lines = (rows: [string, string][]): HTMLElement => h('dl.lines', {}, ...rows.map(([a, b]) => h('div', {}, h('dt', {}, h('code', {}, a)), h('dd', {}, b))))
  const classes = app.collection?.classes ?? []
  const el = dialog('Help',
    h('header.panel-head', {}, h('h2', {}, 'Help'), iconButton('close', 'Close', () => el.close(), { 'data-testid': 'close-help' })),
    h('div.help-body', {},
      h('section', {}, h('h3', {}, 'Keys'), h('dl.keys', {}, ...KEYS.map(([keys, what]) => h('div', {}, h('dt', {}, ...keys.map((k) => h('kbd', {}, k))), h('dd', {}, what))))),
      h('section', {}, h('h3', {}, 'Classes'), lines(CLASS_LINES), classes.length > 0 && h('p.hint', {}, `This collection knows ${classes.join(', ')}.`),
        h('h3', {}, 'Condition'), lines(WHERE_LINES),
        h('h3', {}, 'Labels'), h('ul.legend', {},
          h('li', {}, h('span.state.present', {}, h('span.shape'), 'present'), 'OpenStreetMap has enough of it'),
          h('li', {}, h('span.state.absent', {}, h('span.shape'), 'absent'), 'mapped well, and not there'),
          h('li', {}, h('span.state.unmapped', {}, h('span.shape'), 'unmapped'), 'nobody knows: silence is no absence')),
        h('p.hint', {}, `imagesim ${app.config.version}`))))
  el.dataset['testid'] = 'help'
  return { el, open: () => { if (!el.open) el.showModal() } }
}

/** Ask for the token, once, however many requests were refused. */
export function makeTokenDialog(): { el: HTMLDialogElement; ask: (again: () => void) => void } {
  let waiting: (() => void)[] = []
  const input = h('input', { type: 'text', autocomplete: 'off', spellcheck: 'false', 'aria-label': 'Token', 'data-testid': 'token', required: true })
  const wrong = h('p.hint.warn', { role: 'alert' })
  const form = h('form', { method: 'dialog', onsubmit: (e: Event) => { e.preventDefault(); void enter() } }, h('h2', {}, 'This server asks for a token'), h('p.hint', {}, 'Whoever started it has it: it was printed when the server began.'),
    h('div.field', {}, input), wrong, h('div.row.actions', {}, h('button.button.primary', { type: 'submit', 'data-testid': 'token-send' }, 'Enter')))
  const el = h('dialog.dialog.small', { 'aria-label': 'Token', 'data-testid': 'token-dialog' }, form)
  async function enter(): Promise<void> {
    try {
      await api.enter(input.value.trim())
      el.close()
      input.value = ''
      const again = waiting
      waiting = []
      for (const act of again) act()
    } catch (e) { fill(wrong, e instanceof ApiError && e.status === 401 ? 'That is not the token.' : messageOf(e)) }
  }
  return { el, ask: (again) => { waiting.push(again); if (!el.open) { fill(wrong); el.showModal() } } }
}
