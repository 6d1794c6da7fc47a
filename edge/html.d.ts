/** A page's text, put together by gpu-worker/bundle.ts. */
declare module "*.html" {
  const page: string;
  export default page;
}
