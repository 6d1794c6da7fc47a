/** Pictures as the API takes them: read from files, shrunk when large; and one that is drawn. Knows nothing of the chat. */

export interface Picture {
  name: string;
  /** Media type. */
  type: string;
  /** data: URL. */
  url: string;
}

/** The longest edge that is sent, in pixels: a phone's photo would fill the body, and a model sees no more in it. */
const LONGEST = 2000;
const SENT_AS_IT_IS = ["image/jpeg", "image/png", "image/webp", "image/gif"];

/** Throws an error in words for a file that this browser cannot show. */
export async function readPicture(file: File): Promise<Picture> {
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch (cause) {
    throw new Error(`${file.name} is not a picture that this browser can read.`, { cause });
  }
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && SENT_AS_IT_IS.includes(file.type)) {
    return { name: file.name, type: file.type, url: await dataUrl(file) };
  }
  const [canvas, pen] = sheet(bitmap.width * scale, bitmap.height * scale, "white");
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const type = "image/jpeg";
  return { name: file.name.replace(/\.\w+$|$/, ".jpg"), type, url: canvas.toDataURL(type, 0.9) };
}

function dataUrl(file: File): Promise<string> {
  const reader = new FileReader();
  return new Promise((resolve, reject) => {
    reader.onload = () => resolve(reader.result as string);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function sheet(width: number, height: number, colour: string): [HTMLCanvasElement, CanvasRenderingContext2D] {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width));
  canvas.height = Math.max(1, Math.round(height));
  const pen = canvas.getContext("2d")!;
  pen.fillStyle = colour;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  return [canvas, pen];
}

const BACKGROUNDS = ["#fafafa", "#141414", "#14bed2", "#2ca02c", "#f582be", "#fad21e"];
const COLOURS = [...BACKGROUNDS, "#d62828", "#fa8214", "#8232aa", "#1f5ac8"];
/** Corners, and how far out every second one is. */
const SHAPES = [
  { corners: 60, inner: 1 },
  { corners: 4, inner: 1 },
  { corners: 6, inner: 1 },
  { corners: 10, inner: 0.4 },
];

/** Four shapes in four of nine places, of the kind that the tiny model was made for; other ones each time. */
export function drawExample(): Picture {
  const [background] = shuffle(BACKGROUNDS);
  const colours = shuffle(COLOURS.filter((colour) => colour !== background));
  const [canvas, pen] = sheet(240, 240, background);
  const places = shuffle([0, 1, 2, 3, 4, 5, 6, 7, 8]);
  shuffle(SHAPES).forEach(({ corners, inner }, i) => {
    const [x, y] = [40 + 80 * (places[i] % 3), 40 + 80 * Math.floor(places[i] / 3)];
    const radius = [13, 22, 33][Math.floor(3 * Math.random())];
    pen.fillStyle = colours[i];
    pen.beginPath();
    for (let k = 0; k < corners; k++) {
      const r = k % 2 === 0 ? radius : radius * inner;
      const angle = (2 * Math.PI * k) / corners - Math.PI / 2;
      pen.lineTo(x + r * Math.cos(angle), y + r * Math.sin(angle));
    }
    pen.fill();
  });
  return { name: "example.png", type: "image/png", url: canvas.toDataURL() };
}

function shuffle<T>(items: T[]): T[] {
  return items.map((item) => ({ item, at: Math.random() })).sort((a, b) => a.at - b.at).map(({ item }) => item); // biome-ignore format: one chain
}
