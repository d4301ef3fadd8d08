import { defineConfig } from 'vite'

// Everything the page asks for is relative to the page, so that it also works behind a proxy's path.
export default defineConfig({
  base: './',
  build: {
    outDir: '../imagesim/static',
    emptyOutDir: true,
    target: 'es2022',
    sourcemap: false,
    license: { fileName: 'licenses.md' }, // of what is in the bundle; its licences ask to travel along
    chunkSizeWarningLimit: 1500,
    modulePreload: { polyfill: false },
    rolldownOptions: {
      output: {
        // a server that does not know .mjs sends it as something no browser runs
        assetFileNames: (file) => file.names[0]?.endsWith('.mjs') ? 'assets/[name]-[hash].js' : 'assets/[name]-[hash][extname]',
      },
    },
  },
})
