/** The statistics of the benches, so that those outside this directory need no packages of their own. */
export { geometricMean, max, mean, median, min, quantile } from "simple-statistics";
